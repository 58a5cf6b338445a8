#include "core/deadlines.h"

#include <algorithm>
#include <limits>

namespace thor {

std::optional<std::size_t> Deadlines::expired(Clock::time_point now) {
  for (std::size_t slot = 0; slot < at_.size(); ++slot) {
    if (at_[slot] && *at_[slot] <= now) {
      at_[slot].reset();
      return slot;
    }
  }
  return std::nullopt;
}

int Deadlines::poll_timeout_ms(Clock::time_point now) const {
  std::optional<Clock::time_point> next;
  for (const auto& at : at_) {
    if (at && (!next || *at < *next)) next = at;
  }
  if (!next) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(*next - now).count();
  return static_cast<int>(std::clamp<long long>(left, 0, std::numeric_limits<int>::max()));
}

}  // namespace thor
