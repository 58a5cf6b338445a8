#include "core/output_pace.h"

#include <gtest/gtest.h>

namespace thor {
namespace {

using By = OutputPace::By;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// Writes `lines`, one every `step`; how the next will be written.
By write(OutputPace* pace, std::size_t lines, Clock::duration step, Clock::time_point* now) {
  By by = pace->by();
  for (std::size_t i = 0; i < lines; ++i) by = pace->written(*now += step);
  return by;
}

TEST(OutputPace, ManyLinesAtOnceGoOnInBlocks) {
  OutputPace pace;
  Clock::time_point now{milliseconds(7)};
  EXPECT_EQ(write(&pace, OutputPace::kBurst - 1, microseconds(20), &now), By::kLine);
  EXPECT_EQ(write(&pace, 1, microseconds(20), &now), By::kBlock);
  EXPECT_EQ(write(&pace, 100, OutputPace::kPause - microseconds(1), &now), By::kBlock);
}

TEST(OutputPace, SlowLinesStayLinesHoweverMany) {
  OutputPace pace;
  Clock::time_point now{};
  const auto step =
      microseconds(OutputPace::kBurstTime) / (OutputPace::kBurst - 1) + microseconds(1);
  EXPECT_EQ(write(&pace, 3 * OutputPace::kBurst, step, &now), By::kLine);
}

TEST(OutputPace, SlowLinesDoNotHideAFloodAfterThem) {
  OutputPace pace;
  Clock::time_point now{};
  write(&pace, 100, milliseconds(50), &now);
  EXPECT_EQ(write(&pace, 2 * OutputPace::kBurst, microseconds(1), &now), By::kBlock);
}

TEST(OutputPace, APauseEndsBlocks) {
  OutputPace pace;
  Clock::time_point now{};
  ASSERT_EQ(write(&pace, OutputPace::kBurst, microseconds(1), &now), By::kBlock);
  EXPECT_EQ(pace.written(now += OutputPace::kPause), By::kLine);
  EXPECT_EQ(write(&pace, OutputPace::kBurst - 1, microseconds(1), &now), By::kLine)
      << "it takes as many again";
  EXPECT_EQ(write(&pace, 1, microseconds(1), &now), By::kBlock);
}

TEST(OutputPace, WhoFlushesGetsLines) {
  OutputPace pace;
  Clock::time_point now{};
  ASSERT_EQ(write(&pace, OutputPace::kBurst, microseconds(1), &now), By::kBlock);
  pace.flushed();
  EXPECT_EQ(pace.by(), By::kLine);
  EXPECT_EQ(write(&pace, OutputPace::kBurst - 1, microseconds(1), &now), By::kLine);
}

}  // namespace
}  // namespace thor
