// When a stream is better written in blocks than line by line: while lines pour out.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "core/deadlines.h"

namespace thor {

class OutputPace {
 public:
  enum class By : std::uint8_t { kLine, kBlock };

  // So many lines in so short a time are a flood, of which nobody waits for the next line.
  static constexpr std::size_t kBurst = 8'192;
  static constexpr std::chrono::milliseconds kBurstTime{200};
  // A block that took this long to fill: it is over.
  static constexpr std::chrono::milliseconds kPause{10};

  [[nodiscard]] By by() const { return by_; }

  // A line, or a block, was written; how the next will be.
  By written(Clock::time_point now);

  // Somebody wanted all to be written at once: he gets lines from here on.
  void flushed() { *this = OutputPace(); }

 private:
  By by_ = By::kLine;
  std::size_t lines_ = 0;    // since `since_`
  Clock::time_point since_;  // by block: when the last one was written
};

}  // namespace thor
