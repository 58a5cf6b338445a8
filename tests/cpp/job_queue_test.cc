#include "core/job_queue.h"

#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace thor {
namespace {

constexpr TierMask kAll = ~TierMask{0};

class JobQueueTest : public testing::Test {
 protected:
  JobQueueTest() { queue_.set_state(JobQueue::State::kServing); }

  std::uint64_t submit(std::int32_t priority = 0, std::uint32_t tier = 0) {
    return queue_.submit(
        {.payload = "x", .stdin_data = {}, .limits = {}, .tier = tier, .priority = priority},
        sink_);
  }
  std::uint64_t step(std::uint64_t dialogue) {
    return queue_.submit_step(dialogue, "next", Limits{}, 1, sink_);
  }
  // Tickets in the order in which they are served.
  std::vector<std::uint64_t> served(TierMask tiers = kAll) {
    std::vector<std::uint64_t> out;
    while (const std::optional<Job> job = queue_.next(tiers)) out.push_back(job->ticket);
    return out;
  }

  JobQueue queue_{4, 2};
  std::shared_ptr<CompletionQueue> sink_ = std::make_shared<CompletionQueue>();
};

using Tickets = std::vector<std::uint64_t>;

TEST_F(JobQueueTest, HigherPrioritiesFirstEqualsAsTheyCame) {
  const std::uint64_t first = submit(0);
  const std::uint64_t urgent = submit(5);
  const std::uint64_t low = submit(-3);
  const std::uint64_t second = submit(0);
  EXPECT_EQ(served(), (Tickets{urgent, first, second, low}));
}

TEST_F(JobQueueTest, PrioritiesHoldAcrossTiersThatCanServe) {
  const std::uint64_t in_first = submit(0, 0);
  const std::uint64_t in_third = submit(1, 2);
  EXPECT_EQ(queue_.wanted(), 0b101U);
  EXPECT_EQ(served(0b011), Tickets{in_first});
  EXPECT_EQ(queue_.wanted(), 0b100U);
  EXPECT_EQ(served(), Tickets{in_third});
  EXPECT_EQ(queue_.wanted(), 0U);
}

TEST_F(JobQueueTest, ReroutedRequestsKeepTheirPlaceAndBelongToTheirNewTier) {
  const std::uint64_t a = submit(0, 2);
  const std::uint64_t b = submit(0, 1);
  const std::uint64_t c = submit(0, 2);
  queue_.reroute(2, 1);
  EXPECT_EQ(queue_.wanted(), 0b010U);
  queue_.cancel(c);
  EXPECT_EQ(queue_.take_wishes().waiting.at(0).ticket, c);
  const std::optional<Job> job = queue_.next(0b010);
  EXPECT_EQ(job->ticket, a);
  EXPECT_EQ(job->request.tier, 1U);
  EXPECT_EQ(served(0b010), Tickets{b});
}

TEST_F(JobQueueTest, WhatIsPutBackKeepsItsPlace) {
  const std::uint64_t first = submit();
  const std::uint64_t second = submit();
  queue_.put_back(*queue_.next(kAll));
  EXPECT_EQ(queue_.stats().queued, 2U);
  EXPECT_EQ(served(), (Tickets{first, second}));
}

TEST_F(JobQueueTest, FullIsAnAnswerAndRoomComesBack) {
  for (int i = 0; i < 4; ++i) submit();
  try {
    submit();
    FAIL() << "accepted";
  } catch (const QueueFull& e) {
    EXPECT_STREQ(e.what(), "the queue holds 4 requests, its capacity");
  }
  queue_.next(kAll);
  EXPECT_NO_THROW(submit());
}

TEST_F(JobQueueTest, CancellationsTellWaitingFromRunning) {
  const std::uint64_t running = submit();
  const std::uint64_t waiting = submit();
  queue_.next(kAll);
  queue_.cancel(waiting);
  queue_.cancel(running);
  queue_.cancel(waiting);
  const JobQueue::Wishes wishes = queue_.take_wishes();
  ASSERT_EQ(wishes.waiting.size(), 1U);
  EXPECT_EQ(wishes.waiting[0].ticket, waiting);
  EXPECT_EQ(wishes.others, (Tickets{running, waiting}));
  EXPECT_FALSE(queue_.next(kAll));
  EXPECT_TRUE(queue_.take_wishes().others.empty());
}

TEST_F(JobQueueTest, SoManyDialoguesAndNoMore) {
  const std::uint64_t first = queue_.open_dialogue({});
  queue_.open_dialogue({});
  try {
    queue_.open_dialogue({});
    FAIL() << "opened";
  } catch (const QueueFull& e) {
    EXPECT_STREQ(e.what(), "2 dialogues are open, the most at a time");
  }
  queue_.close_dialogue(first);
  EXPECT_EQ(queue_.stats().dialogues, 1U);
  EXPECT_NO_THROW(queue_.open_dialogue({}));
  EXPECT_THROW(step(first), std::logic_error);
}

TEST_F(JobQueueTest, AStepHasItsDialoguesOpeningAndPriority) {
  const std::uint64_t dialogue = queue_.open_dialogue({.payload = "begin", .priority = 3});
  const std::uint64_t snippet = submit(2);
  const std::uint64_t ticket = step(dialogue);
  const Job job = *queue_.next(kAll);
  EXPECT_EQ(job.ticket, ticket);
  EXPECT_EQ(job.dialogue, dialogue);
  EXPECT_EQ(job.opening->payload, "begin");
  EXPECT_EQ(job.request.payload, "next");
  EXPECT_EQ(job.request.tier, 1U);
  EXPECT_EQ(served(), Tickets{snippet});
}

// A step left in line would open its dialogue anew.
TEST_F(JobQueueTest, StepsOfAClosedDialogueLeaveTheLine) {
  const std::uint64_t closed = queue_.open_dialogue({});
  const std::uint64_t open = queue_.open_dialogue({});
  const std::uint64_t mine = step(closed);
  const std::uint64_t others = step(open);
  const std::uint64_t snippet = submit();
  queue_.close_dialogue(closed);
  queue_.close_dialogue(closed);
  const JobQueue::Wishes wishes = queue_.take_wishes();
  EXPECT_EQ(wishes.closed, Tickets{closed});
  ASSERT_EQ(wishes.closed_steps.size(), 1U);
  EXPECT_EQ(wishes.closed_steps[0].ticket, mine);
  EXPECT_EQ(queue_.stats().queued, 2U);
  EXPECT_EQ(served(), (Tickets{others, snippet}));
}

TEST_F(JobQueueTest, CountsFollowAJob) {
  submit();
  submit();
  EXPECT_EQ(queue_.stats().queued, 2U);
  const Job job = *queue_.next(kAll);
  queue_.set_counts({.running = 1});
  EXPECT_EQ(queue_.stats().counts.running, 1U);
  queue_.answer(job, Result{});
  const OrchestratorStats after = queue_.stats();
  EXPECT_EQ(after.completed, 1U);
  EXPECT_EQ(after.submitted, 2U);
  EXPECT_EQ(after.queued, 1U);
  ASSERT_EQ(sink_->drain().size(), 1U);
  EXPECT_EQ(queue_.take_all().size(), 1U);
  EXPECT_EQ(queue_.stats().queued, 0U);
}

TEST_F(JobQueueTest, BrokenSaysWhyAndClosedIsForGood) {
  queue_.set_state(JobQueue::State::kBroken, "no namespaces here");
  try {
    submit();
    FAIL() << "accepted";
  } catch (const StartError& e) {
    EXPECT_STREQ(e.what(), "no namespaces here");
  }
  queue_.set_state(JobQueue::State::kClosed);
  queue_.set_state(JobQueue::State::kServing);
  EXPECT_THROW(submit(), std::logic_error);
}

}  // namespace
}  // namespace thor
