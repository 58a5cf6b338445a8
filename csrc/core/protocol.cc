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

constexpr std::size_t kControlBytes = 64;  // room for kMaxFds descriptors and a header
static_assert(kControlBytes >= sizeof(cmsghdr) + kMaxFds * sizeof(int));

}  // namespace

bool send_message(int socket, const Message& message, std::span<const int> fds) {
  alignas(cmsghdr) std::array<char, kControlBytes> control{};
  Message copy = message;
  iovec part{&copy, sizeof(copy)};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (!fds.empty()) {
    header.msg_control = control.data();
    header.msg_controllen = sizeof(cmsghdr) + fds.size_bytes();
    attach_fds(&header, fds);
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(sizeof(copy));
}

Received receive_message(int socket, Message* message, std::vector<UniqueFd>* fds) {
  alignas(cmsghdr) std::array<char, kControlBytes> control{};
  iovec part{message, sizeof(*message)};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  const ssize_t got = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return Received::kNothing;
  if (got > 0) detach_fds(&header, fds);
  return got == static_cast<ssize_t>(sizeof(*message)) ? Received::kMessage : Received::kClosed;
}

}  // namespace thor
