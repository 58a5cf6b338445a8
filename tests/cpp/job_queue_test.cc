#include "core/job_queue.h"

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>

namespace thor {
namespace {

class JobQueueTest : public testing::Test {
 protected:
  JobQueueTest() { queue_.set_state(JobQueue::State::kServing); }

  std::uint64_t submit(const char* payload) { return queue_.submit({.payload = payload}, sink_); }

  JobQueue queue_{2};
  std::shared_ptr<CompletionQueue> sink_ = std::make_shared<CompletionQueue>();
};

TEST_F(JobQueueTest, FirstComeFirstServed) {
  const std::uint64_t first = submit("a");
  const std::uint64_t second = submit("b");
  EXPECT_NE(first, second);
  EXPECT_EQ(queue_.next()->ticket, first);
  EXPECT_EQ(queue_.next()->ticket, second);
  EXPECT_FALSE(queue_.next());
}

TEST_F(JobQueueTest, FullIsAnAnswerAndRoomComesBack) {
  submit("a");
  submit("b");
  EXPECT_THROW(submit("c"), QueueFull);
  queue_.next();
  EXPECT_NO_THROW(submit("c"));
}

TEST_F(JobQueueTest, CancellationsTellWaitingFromRunning) {
  const std::uint64_t running = submit("a");
  const std::uint64_t waiting = submit("b");
  queue_.next();
  queue_.cancel(waiting);
  queue_.cancel(running);
  const JobQueue::Cancellations cancelled = queue_.take_cancellations();
  ASSERT_EQ(cancelled.waiting.size(), 1U);
  EXPECT_EQ(cancelled.waiting[0].ticket, waiting);
  EXPECT_EQ(cancelled.others, std::vector<std::uint64_t>{running});
  EXPECT_FALSE(queue_.next());
  EXPECT_TRUE(queue_.take_cancellations().others.empty());
}

TEST_F(JobQueueTest, CountsFollowAJob) {
  submit("a");
  submit("b");
  EXPECT_EQ(queue_.stats().queued, 2U);
  const Job job = *queue_.next();
  EXPECT_EQ(queue_.stats().running, 1U);
  queue_.answer(job, Result{}, true);
  const OrchestratorStats after = queue_.stats();
  EXPECT_EQ(after.running, 0U);
  EXPECT_EQ(after.completed, 1U);
  EXPECT_EQ(after.submitted, 2U);
  ASSERT_EQ(sink_->drain().size(), 1U);
}

TEST_F(JobQueueTest, BrokenSaysWhyAndClosedIsForGood) {
  queue_.set_state(JobQueue::State::kBroken, "no namespaces here");
  try {
    submit("a");
    FAIL() << "accepted";
  } catch (const StartError& e) {
    EXPECT_STREQ(e.what(), "no namespaces here");
  }
  queue_.set_state(JobQueue::State::kClosed);
  queue_.set_state(JobQueue::State::kServing);
  EXPECT_THROW(submit("a"), std::logic_error);
}

}  // namespace
}  // namespace thor
