#include "core/job_queue.h"

#include <stdexcept>
#include <utility>

namespace thor {

std::uint64_t JobQueue::submit(Request request, std::shared_ptr<CompletionQueue> sink) {
  const std::lock_guard lock(mutex_);
  return enqueue_locked({.ticket = 0,
                         .request = std::move(request),
                         .dialogue = 0,
                         .opening = {},
                         .sink = std::move(sink)});
}

std::uint64_t JobQueue::submit_step(std::uint64_t dialogue, std::string data, const Limits& limits,
                                    std::uint32_t tier, std::shared_ptr<CompletionQueue> sink) {
  const std::lock_guard lock(mutex_);
  const auto found = dialogues_.find(dialogue);
  if (found == dialogues_.end()) throw std::logic_error("the dialogue is closed");
  const Request& opening = *found->second;
  Request request{.payload = std::move(data),
                  .stdin_data = {},
                  .limits = limits,
                  .tier = tier,
                  .priority = opening.priority};
  return enqueue_locked({.ticket = 0,
                         .request = std::move(request),
                         .dialogue = dialogue,
                         .opening = found->second,
                         .sink = std::move(sink)});
}

std::uint64_t JobQueue::enqueue_locked(Job job) {
  if (state_ == State::kClosed) throw std::logic_error("the sandbox is closed");
  if (state_ == State::kBroken) throw StartError(reason_);
  if (places_.size() >= capacity_) {
    throw QueueFull("the queue holds " + std::to_string(places_.size()) +
                    " requests, its capacity");
  }
  ++stats_.submitted;
  job.ticket = ++last_ticket_;
  line_up_locked(std::move(job));
  return last_ticket_;
}

void JobQueue::line_up_locked(Job job) {
  const Rank rank{job.request.priority, job.ticket};
  const std::uint32_t tier = job.request.tier;
  places_.emplace(job.ticket, std::pair{tier, rank});
  lines_[tier].emplace(rank, std::move(job));
}

void JobQueue::put_back(Job job) {
  const std::lock_guard lock(mutex_);
  line_up_locked(std::move(job));
}

void JobQueue::cancel(std::uint64_t ticket) {
  const std::lock_guard lock(mutex_);
  cancelled_.push_back(ticket);
}

std::uint64_t JobQueue::open_dialogue(Request opening) {
  const std::lock_guard lock(mutex_);
  if (dialogues_.size() >= max_dialogues_) {
    throw QueueFull(std::to_string(dialogues_.size()) + " dialogues are open, the most at a time");
  }
  dialogues_.emplace(++last_dialogue_, std::make_shared<const Request>(std::move(opening)));
  return last_dialogue_;
}

void JobQueue::close_dialogue(std::uint64_t dialogue) {
  const std::lock_guard lock(mutex_);
  if (dialogues_.erase(dialogue) > 0) closed_dialogues_.push_back(dialogue);
}

OrchestratorStats JobQueue::stats() const {
  const std::lock_guard lock(mutex_);
  OrchestratorStats out = stats_;
  out.queued = places_.size();
  out.dialogues = dialogues_.size();
  return out;
}

void JobQueue::set_state(State state, const std::string& reason) {
  const std::lock_guard lock(mutex_);
  if (state_ == State::kClosed) return;
  state_ = state;
  reason_ = reason;
}

JobQueue::State JobQueue::state() const {
  const std::lock_guard lock(mutex_);
  return state_;
}

std::string JobQueue::reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

std::optional<Job> JobQueue::take_locked(std::uint64_t ticket) {
  const auto place = places_.find(ticket);
  if (place == places_.end()) return std::nullopt;
  const auto [tier, rank] = place->second;
  places_.erase(place);
  auto node = lines_[tier].extract(rank);
  return std::move(node.mapped());
}

std::optional<Job> JobQueue::next(TierMask tiers) {
  const std::lock_guard lock(mutex_);
  const Rank* best = nullptr;
  for (const auto& [tier, line] : lines_) {
    if ((tiers >> tier & 1U) == 0 || line.empty()) continue;
    if (best == nullptr || line.begin()->first < *best) best = &line.begin()->first;
  }
  if (best == nullptr) return std::nullopt;
  return take_locked(best->ticket);
}

TierMask JobQueue::wanted() const {
  const std::lock_guard lock(mutex_);
  TierMask mask = 0;
  for (const auto& [tier, line] : lines_) {
    if (!line.empty()) mask |= TierMask{1} << tier;
  }
  return mask;
}

void JobQueue::reroute(std::uint32_t from, std::uint32_t to) {
  const std::lock_guard lock(mutex_);
  for (auto& [rank, job] : lines_[from]) {
    job.request.tier = to;  // what decides whose jail it gets
    places_[rank.ticket].first = to;
  }
  lines_[to].merge(lines_[from]);
}

JobQueue::Wishes JobQueue::take_wishes() {
  const std::lock_guard lock(mutex_);
  Wishes out;
  for (const std::uint64_t ticket : std::exchange(cancelled_, {})) {
    if (std::optional<Job> job = take_locked(ticket)) {
      out.waiting.push_back(std::move(*job));
    } else {
      out.others.push_back(ticket);
    }
  }
  out.closed = std::exchange(closed_dialogues_, {});
  if (!out.closed.empty()) out.closed_steps = take_orphans_locked();
  return out;
}

// Left in line, one would open its dialogue once more, and nobody could close that.
std::vector<Job> JobQueue::take_orphans_locked() {
  std::vector<Job> out;
  for (auto& [tier, line] : lines_) {
    for (auto at = line.begin(); at != line.end();) {
      Job& job = at->second;
      if (job.dialogue == 0 || dialogues_.contains(job.dialogue)) {
        ++at;
        continue;
      }
      places_.erase(job.ticket);
      out.push_back(std::move(job));
      at = line.erase(at);
    }
  }
  return out;
}

std::vector<Job> JobQueue::take_all() {
  const std::lock_guard lock(mutex_);
  std::vector<Job> out;
  for (auto& [tier, line] : std::exchange(lines_, {})) {
    for (auto& [rank, job] : line) out.push_back(std::move(job));
  }
  places_.clear();
  return out;
}

void JobQueue::answer(const Job& job, Result result) {
  {
    const std::lock_guard lock(mutex_);
    ++stats_.completed;
  }
  job.sink->push({job.ticket, std::move(result)});
}

void JobQueue::set_counts(const OrchestratorCounts& counts) {
  const std::lock_guard lock(mutex_);
  stats_.counts = counts;
}

}  // namespace thor
