// What a dialogue's guest sends: datagrams of any length, with descriptors or without, and its end
// closed at any moment. The input: letters, each with its arguments.
//   s SIZE FILL   SIZE * 256 + FILL bytes, all FILL        f   the same with a descriptor
//   t             the orchestrator takes one               c   the guest closes
#include <sys/socket.h>

#include <array>
#include <deque>
#include <optional>
#include <string>

#include "core/jail_handle.h"
#include "input.h"

namespace {

// Bytes with or without a descriptor; false if the socket is full.
bool say(int socket, std::string text, bool descriptor) {
  iovec part{text.data(), text.size()};
  alignas(cmsghdr) std::array<char, 64> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (descriptor) {
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(sizeof(int));
    cmsghdr* first = CMSG_FIRSTHDR(&header);
    *first = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    *reinterpret_cast<int*>(CMSG_DATA(first)) = socket;
  }
  return ::sendmsg(socket, &header, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  std::array<int, 2> ends{};
  thor::require(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends.data()) == 0);
  thor::JailHandle jail;
  jail.dialogue_socket.reset(ends[0]);
  thor::UniqueFd guest(ends[1]);
  std::deque<std::string> sent;  // and not taken yet
  thor::Input input(data, size);
  while (!input.empty()) {
    const unsigned char what = input.byte();
    if ((what == 's' || what == 'f') && guest) {
      const std::size_t length = input.byte() * std::size_t{256};
      const unsigned char fill = input.byte();
      const std::string text(length + fill, static_cast<char>(fill));
      if (say(guest.get(), text, what == 'f')) sent.push_back(text);
    } else if (what == 'c') {
      guest.reset();
    } else if (what == 't') {
      std::string got = "untouched";
      const thor::Reply reply = thor::receive_reply(jail, &got);
      if (sent.empty()) {
        thor::require(reply == (guest ? thor::Reply::kNothing : thor::Reply::kClosed));
        continue;
      }
      const std::string expected = sent.front().substr(0, thor::kMaxReply);
      sent.pop_front();
      // An empty one cannot be told from a close.
      thor::require(expected.empty() ? reply == thor::Reply::kClosed
                                     : reply == thor::Reply::kReply && got == expected);
    }
  }
  return 0;
}
