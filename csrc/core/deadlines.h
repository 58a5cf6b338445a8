// When each slot must be looked at; the clock is passed in, so tests own it.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <vector>

namespace thor {

using Clock = std::chrono::steady_clock;

class Deadlines {
 public:
  explicit Deadlines(std::size_t slots) : at_(slots) {}

  void set(std::size_t slot, Clock::time_point at) { at_[slot] = at; }
  void clear(std::size_t slot) { at_[slot].reset(); }

  // A slot whose time has come (then cleared), if any.
  std::optional<std::size_t> expired(Clock::time_point now);

  // Milliseconds for epoll_wait until the next one: -1 for none, rounded up so it never spins.
  [[nodiscard]] int poll_timeout_ms(Clock::time_point now) const;

 private:
  std::vector<std::optional<Clock::time_point>> at_;  // few slots: a scan beats a heap
};

}  // namespace thor
