#include "core/deadlines.h"

#include <gtest/gtest.h>

#include <limits>

namespace thor {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

TEST(Deadlines, NoneMeansWaitForEver) {
  Deadlines deadlines(3);
  EXPECT_EQ(deadlines.poll_timeout_ms(Clock::time_point{}), -1);
  EXPECT_FALSE(deadlines.expired(Clock::time_point{}));
}

TEST(Deadlines, WaitsForTheEarliestRoundedUp) {
  Deadlines deadlines(3);
  const Clock::time_point now{};
  deadlines.set(0, now + milliseconds(30));
  deadlines.set(2, now + microseconds(1'200));
  EXPECT_EQ(deadlines.poll_timeout_ms(now), 2);  // rounding down would spin for 0.2 ms
  deadlines.clear(2);
  EXPECT_EQ(deadlines.poll_timeout_ms(now), 30);
}

TEST(Deadlines, ReportsEachExpiryOnce) {
  Deadlines deadlines(2);
  const Clock::time_point now{};
  deadlines.set(0, now + milliseconds(5));
  deadlines.set(1, now + milliseconds(5));
  EXPECT_FALSE(deadlines.expired(now + milliseconds(4)));
  EXPECT_EQ(deadlines.expired(now + milliseconds(5)), 0U);
  EXPECT_EQ(deadlines.expired(now + milliseconds(5)), 1U);
  EXPECT_FALSE(deadlines.expired(now + milliseconds(5)));
}

TEST(Deadlines, APassedDeadlineNeedsNoWait) {
  Deadlines deadlines(1);
  const Clock::time_point now{milliseconds(100)};
  deadlines.set(0, now - milliseconds(50));
  EXPECT_EQ(deadlines.poll_timeout_ms(now), 0);
}

TEST(Deadlines, TheLastWordCounts) {
  Deadlines deadlines(1);
  const Clock::time_point now{milliseconds(100)};
  deadlines.set(0, now);
  deadlines.set(0, now + milliseconds(20));  // as when a kill's grace follows a timeout
  EXPECT_FALSE(deadlines.expired(now));
  EXPECT_EQ(deadlines.poll_timeout_ms(now), 20);
  deadlines.clear(0);
  EXPECT_FALSE(deadlines.expired(now + milliseconds(30)));
}

TEST(Deadlines, OneFarAwayFitsAnInt) {
  Deadlines deadlines(1);
  const Clock::time_point now{};
  deadlines.set(0, now + std::chrono::hours(24 * 365 * 100));
  EXPECT_EQ(deadlines.poll_timeout_ms(now), std::numeric_limits<int>::max());
}

}  // namespace
}  // namespace thor
