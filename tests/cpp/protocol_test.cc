#include "core/protocol.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <utility>

namespace thor {
namespace {

std::pair<UniqueFd, UniqueFd> connected() {
  std::array<int, 2> ends{};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()),
            0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

TEST(Protocol, CarriesFieldsAndDescriptors) {
  auto [left, right] = connected();
  std::array<int, 2> pipe_ends{};
  ASSERT_EQ(::pipe(pipe_ends.data()), 0);
  const UniqueFd read_end(pipe_ends[0]);
  UniqueFd write_end(pipe_ends[1]);
  const Message sent{.kind = MessageKind::kRun, .uid_offset = 7, .limits = {.max_processes = 5}};
  ASSERT_TRUE(send_message(left.get(), sent, {pipe_ends.data() + 1, 1}));
  write_end.reset();

  Message got;
  std::vector<UniqueFd> fds;
  ASSERT_EQ(receive_message(right.get(), &got, &fds), Received::kMessage);
  EXPECT_EQ(got.kind, MessageKind::kRun);
  EXPECT_EQ(got.uid_offset, 7U);
  EXPECT_EQ(got.limits.max_processes, 5U);
  ASSERT_EQ(fds.size(), 1U);
  ASSERT_EQ(::write(fds[0].get(), "x", 1), 1);
  char c = 0;
  EXPECT_EQ(::read(read_end.get(), &c, 1), 1);
  EXPECT_EQ(c, 'x');
}

TEST(Protocol, NothingWaiting) {
  auto [left, right] = connected();
  Message got;
  std::vector<UniqueFd> fds;
  EXPECT_EQ(receive_message(right.get(), &got, &fds), Received::kNothing);
}

TEST(Protocol, ClosedPeer) {
  auto [left, right] = connected();
  left.reset();
  Message got;
  std::vector<UniqueFd> fds;
  EXPECT_EQ(receive_message(right.get(), &got, &fds), Received::kClosed);
  EXPECT_FALSE(send_message(right.get(), got));
}

// A zygote that goes because its child took no request leaves that request unread.
TEST(Protocol, LastWordsOfAPeerThatLeftOursUnread) {
  auto [left, right] = connected();
  ASSERT_TRUE(send_message(left.get(), {.kind = MessageKind::kRun}));
  ASSERT_TRUE(send_message(right.get(), {.kind = MessageKind::kExited}));
  right.reset();
  Message got;
  std::vector<UniqueFd> fds;
  ASSERT_EQ(receive_message(left.get(), &got, &fds), Received::kMessage);
  EXPECT_EQ(got.kind, MessageKind::kExited);
  EXPECT_EQ(receive_message(left.get(), &got, &fds), Received::kClosed);
}

TEST(Protocol, AMessageOfTheWrongSizeIsNotUnderstood) {
  auto [left, right] = connected();
  ASSERT_EQ(::send(left.get(), "hello", 5, 0), 5);
  Message got;
  std::vector<UniqueFd> fds;
  EXPECT_EQ(receive_message(right.get(), &got, &fds), Received::kClosed);
}

TEST(Protocol, DescriptorsOfABadMessageAreNotLeaked) {
  auto [left, right] = connected();
  const int before = ::dup(left.get());
  ::close(before);
  Message message;
  const int fd = left.get();
  ASSERT_TRUE(send_message(left.get(), message, {&fd, 1}));
  {
    std::vector<UniqueFd> fds;
    ASSERT_EQ(receive_message(right.get(), &message, &fds), Received::kMessage);
    ASSERT_EQ(fds.size(), 1U);
  }
  const int after = ::dup(left.get());
  EXPECT_EQ(after, before);
  ::close(after);
}

void send_empty_with_descriptor(int socket) {
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr header{};
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  cmsghdr* first = CMSG_FIRSTHDR(&header);
  first->cmsg_level = SOL_SOCKET;
  first->cmsg_type = SCM_RIGHTS;
  first->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(first), &socket, sizeof(int));
  ASSERT_EQ(::sendmsg(socket, &header, 0), 0);
}

TEST(Protocol, DescriptorsOfAnEmptyMessageAreNotLeaked) {
  auto [left, right] = connected();
  send_empty_with_descriptor(left.get());
  Message message;
  std::vector<UniqueFd> fds;
  EXPECT_EQ(receive_message(right.get(), &message, &fds), Received::kClosed);
  EXPECT_EQ(fds.size(), 1U);
}

TEST(Protocol, WhatNoCompilerWritesIsNotUnderstood) {
  for (const std::size_t byte :
       {offsetof(Message, kind), offsetof(Message, payload_is_file), offsetof(Message, has_stdin),
        offsetof(Message, has_dialogue), offsetof(Message, started), offsetof(Message, pristine),
        offsetof(Message, out_of_memory), offsetof(Message, tree_out_of_memory)}) {
    auto [left, right] = connected();
    std::array<unsigned char, sizeof(Message)> sent{};
    sent.at(byte) = 8;
    ASSERT_EQ(::send(left.get(), sent.data(), sent.size(), 0), std::ssize(sent));
    Message got;
    std::vector<UniqueFd> fds;
    EXPECT_EQ(receive_message(right.get(), &got, &fds), Received::kClosed) << "byte " << byte;
  }
}

}  // namespace
}  // namespace thor
