// What callers and the orchestrator's thread share: requests that wait, wishes to cancel, counts,
// and whether there is anybody to serve them. Every call takes one short lock and never waits.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/slot.h"
#include "thor/completion_queue.h"
#include "thor/execution.h"
#include "thor/orchestrator.h"

namespace thor {

using TierMask = std::uint64_t;

class JobQueue {
 public:
  enum class State : std::uint8_t { kStarting, kServing, kBroken, kClosed };

  JobQueue(std::size_t capacity, std::size_t max_dialogues)
      : capacity_(capacity), max_dialogues_(max_dialogues) {}

  // --- for callers ---

  // Throws QueueFull, StartError once broken, std::logic_error once closed.
  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink);
  void cancel(std::uint64_t ticket);

  // Throws QueueFull when the most are open.
  std::uint64_t open_dialogue(Request opening);
  // As submit; std::logic_error for a dialogue that is not open.
  std::uint64_t submit_step(std::uint64_t dialogue, std::string data, const Limits& limits,
                            std::uint32_t tier, std::shared_ptr<CompletionQueue> sink);
  void close_dialogue(std::uint64_t dialogue);

  [[nodiscard]] OrchestratorStats stats() const;

  // --- for the orchestrator ---

  // Once closed it stays closed; `reason` is what callers of a broken sandbox are told.
  void set_state(State state, const std::string& reason = "");
  [[nodiscard]] State state() const;
  [[nodiscard]] std::string reason() const;

  // The next request among those of `tiers`.
  std::optional<Job> next(TierMask tiers);

  // The tiers that requests wait for.
  [[nodiscard]] TierMask wanted() const;

  // Requests of tier `from` will be served by tier `to`.
  void reroute(std::uint32_t from, std::uint32_t to);

  // Puts back one that next() gave and that did not start; it keeps its place.
  void put_back(Job job);

  // What callers wished since the last call. `waiting` are taken out of the queue, `others` may be
  // running; `closed` are dialogues, `closed_steps` what waited of them, taken out too.
  struct Wishes {
    std::vector<Job> waiting;
    std::vector<std::uint64_t> others;
    std::vector<std::uint64_t> closed;
    std::vector<Job> closed_steps;
  };
  Wishes take_wishes();

  // All that still wait, taken out.
  std::vector<Job> take_all();

  // Hands a result to whoever asked.
  void answer(const Job& job, Result result);

  // The orchestrator's own counts; the others are kept here.
  void set_counts(const OrchestratorCounts& counts);

 private:
  struct Rank {
    std::int32_t priority;
    std::uint64_t ticket;
    friend std::strong_ordering operator<=>(const Rank& a, const Rank& b) {
      if (a.priority != b.priority) return b.priority <=> a.priority;
      return a.ticket <=> b.ticket;
    }
  };
  using Line = std::map<Rank, Job>;

  std::uint64_t enqueue_locked(Job job);
  void line_up_locked(Job job);
  std::optional<Job> take_locked(std::uint64_t ticket);
  std::vector<Job> take_orphans_locked();

  const std::size_t capacity_;
  const std::size_t max_dialogues_;
  mutable std::mutex mutex_;  // guards all below
  State state_ = State::kStarting;
  std::string reason_;
  std::map<std::uint32_t, Line> lines_;                                       // by tier
  std::unordered_map<std::uint64_t, std::pair<std::uint32_t, Rank>> places_;  // by ticket
  std::vector<std::uint64_t> cancelled_;
  std::map<std::uint64_t, std::shared_ptr<const Request>> dialogues_;  // open ones
  std::vector<std::uint64_t> closed_dialogues_;
  std::uint64_t last_ticket_ = 0;
  std::uint64_t last_dialogue_ = 0;
  OrchestratorStats stats_;
};

}  // namespace thor
