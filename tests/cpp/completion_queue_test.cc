#include "thor/completion_queue.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <set>
#include <thread>

namespace thor {
namespace {

bool readable(int fd) {
  pollfd wait{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&wait, 1, 0) == 1;
}

TEST(CompletionQueue, EventFdFollowsContents) {
  CompletionQueue queue;
  EXPECT_FALSE(readable(queue.event_fd()));
  queue.push({1, {}});
  queue.push({2, {}});
  EXPECT_TRUE(readable(queue.event_fd()));
  EXPECT_EQ(queue.drain().size(), 2U);
  EXPECT_FALSE(readable(queue.event_fd()));
  EXPECT_TRUE(queue.drain().empty());
}

TEST(CompletionQueue, WaitReturnsEmptyAfterItsTimeout) {
  CompletionQueue queue;
  EXPECT_TRUE(queue.wait(std::chrono::milliseconds(5)).empty());
}

TEST(CompletionQueue, NothingIsLostOrDoubledAcrossThreads) {
  CompletionQueue queue;
  constexpr std::uint64_t kCount = 20'000;
  std::thread producer([&queue] {
    for (std::uint64_t i = 0; i < kCount; ++i) queue.push({i, {}});
  });
  std::multiset<std::uint64_t> seen;
  while (seen.size() < kCount) {
    for (const Completion& done : queue.wait(std::chrono::milliseconds(1'000))) {
      seen.insert(done.ticket);
    }
  }
  producer.join();
  EXPECT_EQ(seen.size(), kCount);
  EXPECT_EQ(std::set<std::uint64_t>(seen.begin(), seen.end()).size(), kCount);
}

}  // namespace
}  // namespace thor
