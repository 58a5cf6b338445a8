// Datagrams of any length and content, with up to three descriptors.
#include <sys/socket.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/protocol.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  if (size == 0) return 0;
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, ends.data()) != 0) std::abort();
  const thor::UniqueFd left(ends[0]);
  const thor::UniqueFd right(ends[1]);
  const std::array<int, 3> fds{ends[0], ends[1], ends[0]};
  thor::Message message;
  const std::string_view rest(reinterpret_cast<const char*>(data), size);
  if (data[0] % 2 == 0) {
    ::send(left.get(), data, size, MSG_NOSIGNAL);
  } else {
    thor::send_message(left.get(), message, {fds.data(), data[0] / 2U % 4}, rest.substr(1));
  }
  std::vector<thor::UniqueFd> received;
  std::string payload;
  const thor::Received got = thor::receive_message(right.get(), &message, &received, &payload);
  if (got == thor::Received::kMessage && payload.size() > thor::kMaxInlinePayload) std::abort();
  return 0;
}
