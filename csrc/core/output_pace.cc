#include "core/output_pace.h"

namespace thor {

OutputPace::By OutputPace::written(Clock::time_point now) {
  if (by_ == By::kBlock) {
    if (now - since_ >= kPause) flushed();
    since_ = now;
    return by_;
  }
  if (lines_ == 0) since_ = now;
  if (++lines_ < kBurst) return by_;
  if (now - since_ < kBurstTime) by_ = By::kBlock;
  lines_ = 0;
  since_ = now;
  return by_;
}

}  // namespace thor
