#include "core/jail_handle.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <system_error>
#include <vector>

#include "core/handover.h"

namespace thor {

void send_run(JailHandle* jail, const Request& opening) {
  Message run{.kind = MessageKind::kRun, .limits = opening.limits};
  std::vector<int> fds;
  UniqueFd payload;
  UniqueFd input;
  UniqueFd theirs;
  std::string text;
  for (const std::string& path : opening.collect) text.append(path).push_back('\0');
  run.collect_bytes = static_cast<std::uint32_t>(text.size());
  if (text.size() + opening.payload.size() > kMaxInlinePayload) {
    payload = input_file(opening.payload);
    fds.push_back(payload.get());
    run.payload_is_file = true;
  } else {
    text += opening.payload;
  }
  if (!opening.stdin_data.empty()) {
    input = input_file(opening.stdin_data);
    fds.push_back(input.get());
    run.has_stdin = true;
  }
  if (jail->dialogue != 0) {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) {
      throw std::system_error(errno, std::generic_category(), "socketpair");
    }
    jail->dialogue_socket.reset(ends[0]);
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
    theirs.reset(ends[1]);
    fds.push_back(theirs.get());
    run.has_dialogue = true;
  }
  jail->state = JailHandle::State::kRunning;
  if (!send_message(jail->socket.get(), run, fds, text) && errno != EPIPE && errno != ECONNRESET) {
    throw std::system_error(errno, std::generic_category(), "sending to a jail");
  }
}

void send_step(const JailHandle& jail, const std::string& data) {
  // As a file: it may be long, and its reader busy.
  const UniqueFd file = input_file(data);
  const int handle = file.get();
  send_message(jail.dialogue_socket.get(), {.kind = MessageKind::kStep}, {&handle, 1});
}

Reply receive_reply(const JailHandle& jail, std::string* text) {
  std::array<char, kMaxReply> buffer;
  const ssize_t n = ::recv(jail.dialogue_socket.get(), buffer.data(), buffer.size(), 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return Reply::kNothing;
  if (n <= 0) return Reply::kClosed;
  text->assign(buffer.data(), static_cast<std::size_t>(n));
  return Reply::kReply;
}

}  // namespace thor
