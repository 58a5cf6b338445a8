#include "core/protocol.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

namespace thor {
namespace {

// cmsg macros cast in the old style; these two functions are the only place that uses them.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"

void attach_fds(msghdr* header, std::span<const int> fds) {
  cmsghdr* control = CMSG_FIRSTHDR(header);
  control->cmsg_level = SOL_SOCKET;
  control->cmsg_type = SCM_RIGHTS;
  control->cmsg_len = CMSG_LEN(fds.size_bytes());
  std::memcpy(CMSG_DATA(control), fds.data(), fds.size_bytes());
}

void detach_fds(msghdr* header, std::vector<UniqueFd>* fds) {
  for (cmsghdr* c = CMSG_FIRSTHDR(header); c != nullptr; c = CMSG_NXTHDR(header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds->emplace_back(fd);
    }
  }
}

#pragma GCC diagnostic pop

// A sender that lost its way must not get past us what no compiler would write, and so none
// expects.
bool well_formed(const Message& message) {
  const auto valid = [](const bool& flag) {
    return reinterpret_cast<const unsigned char&>(flag) < 2;
  };
  return message.kind <= MessageKind::kStep && valid(message.payload_is_file) &&
         valid(message.has_stdin) && valid(message.has_dialogue) && valid(message.started) &&
         valid(message.pristine) && valid(message.out_of_memory) &&
         valid(message.tree_out_of_memory);
}

constexpr std::size_t kControlBytes = 160;  // room for kMaxFds descriptors and a header
static_assert(kControlBytes >= sizeof(cmsghdr) + kMaxFds * sizeof(int));

}  // namespace

bool send_message(int socket, const Message& message, std::span<const int> fds,
                  std::string_view payload) {
  alignas(cmsghdr) std::array<char, kControlBytes> control{};
  Message copy = message;
  // The kernel does not write through the pointers; their type predates const.
  std::array<iovec, 2> parts{
      {{&copy, sizeof(copy)}, {const_cast<char*>(payload.data()), payload.size()}}};
  msghdr header{};
  header.msg_iov = parts.data();
  header.msg_iovlen = payload.empty() ? 1 : 2;
  if (!fds.empty()) {
    header.msg_control = control.data();
    header.msg_controllen = sizeof(cmsghdr) + fds.size_bytes();
    attach_fds(&header, fds);
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(sizeof(copy) + payload.size());
}

Received receive_message(int socket, Message* message, std::vector<UniqueFd>* fds,
                         std::string* payload) {
  alignas(cmsghdr) std::array<char, kControlBytes> control{};
  // Not a std::string: that would touch, and so copy, all of its pages in a fresh child.
  std::array<char, kMaxInlinePayload> text;
  std::array<iovec, 2> parts{{{message, sizeof(*message)}, {text.data(), text.size()}}};
  msghdr header{};
  header.msg_iov = parts.data();
  header.msg_iovlen = payload == nullptr ? 1 : 2;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  ssize_t got = 0;
  // Reset: a peer that is gone left unread what we sent. What it sent before that is still here.
  do {
    got = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == ECONNRESET);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return Received::kNothing;
  if (got >= 0) detach_fds(&header, fds);  // an empty datagram can carry some too
  constexpr auto kHead = static_cast<ssize_t>(sizeof(*message));
  if (got < kHead || (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 || !well_formed(*message)) {
    return Received::kClosed;
  }
  if (payload != nullptr) payload->assign(text.data(), static_cast<std::size_t>(got - kHead));
  return Received::kMessage;
}

}  // namespace thor
