// What callers and the orchestrator's thread share: requests that wait, wishes to cancel, counts,
// and whether there is anybody to serve them. Every call takes one short lock and never waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/slot.h"
#include "thor/completion_queue.h"
#include "thor/execution.h"
#include "thor/orchestrator.h"

namespace thor {

class JobQueue {
 public:
  enum class State : std::uint8_t { kStarting, kServing, kBroken, kClosed };

  explicit JobQueue(std::size_t capacity) : capacity_(capacity) {}

  // --- for callers ---

  // Throws QueueFull, StartError once broken, std::logic_error once closed.
  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink);
  void cancel(std::uint64_t ticket);
  [[nodiscard]] OrchestratorStats stats() const;

  // --- for the orchestrator ---

  // Once closed it stays closed; `reason` is what callers of a broken sandbox are told.
  void set_state(State state, const std::string& reason = "");
  [[nodiscard]] State state() const;
  [[nodiscard]] std::string reason() const;

  // The next request, counted as running.
  std::optional<Job> next();

  // Whom to cancel since the last call: `waiting` are taken out of the queue, `others` may be
  // running.
  struct Cancellations {
    std::vector<Job> waiting;
    std::vector<std::uint64_t> others;
  };
  Cancellations take_cancellations();

  // All that still wait, taken out.
  std::deque<Job> take_all();

  // Hands a result to whoever asked. `was_running`: it came through next().
  void answer(const Job& job, Result result, bool was_running);

  void count_zygote_start();

 private:
  const std::size_t capacity_;
  mutable std::mutex mutex_;  // guards all below
  State state_ = State::kStarting;
  std::string reason_;
  std::deque<Job> waiting_;
  std::vector<std::uint64_t> cancelled_;
  std::uint64_t last_ticket_ = 0;
  OrchestratorStats stats_;
};

}  // namespace thor
