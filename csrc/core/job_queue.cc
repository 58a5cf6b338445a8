#include "core/job_queue.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace thor {

std::uint64_t JobQueue::submit(Request request, std::shared_ptr<CompletionQueue> sink) {
  const std::lock_guard lock(mutex_);
  if (state_ == State::kClosed) throw std::logic_error("the sandbox is closed");
  if (state_ == State::kBroken) throw StartError(reason_);
  if (waiting_.size() >= capacity_) {
    throw QueueFull("the queue holds " + std::to_string(waiting_.size()) +
                    " requests, its capacity");
  }
  ++stats_.submitted;
  waiting_.push_back({++last_ticket_, std::move(request), std::move(sink)});
  return last_ticket_;
}

void JobQueue::cancel(std::uint64_t ticket) {
  const std::lock_guard lock(mutex_);
  cancelled_.push_back(ticket);
}

OrchestratorStats JobQueue::stats() const {
  const std::lock_guard lock(mutex_);
  OrchestratorStats out = stats_;
  out.queued = waiting_.size();
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

std::optional<Job> JobQueue::next() {
  const std::lock_guard lock(mutex_);
  if (waiting_.empty()) return std::nullopt;
  Job job = std::move(waiting_.front());
  waiting_.pop_front();
  ++stats_.running;
  return job;
}

JobQueue::Cancellations JobQueue::take_cancellations() {
  const std::lock_guard lock(mutex_);
  Cancellations out;
  for (const std::uint64_t ticket : std::exchange(cancelled_, {})) {
    const auto it = std::find_if(waiting_.begin(), waiting_.end(),
                                 [ticket](const Job& job) { return job.ticket == ticket; });
    if (it == waiting_.end()) {
      out.others.push_back(ticket);
    } else {
      out.waiting.push_back(std::move(*it));
      waiting_.erase(it);
    }
  }
  return out;
}

std::deque<Job> JobQueue::take_all() {
  const std::lock_guard lock(mutex_);
  return std::exchange(waiting_, {});
}

void JobQueue::answer(const Job& job, Result result, bool was_running) {
  {
    const std::lock_guard lock(mutex_);
    ++stats_.completed;
    if (was_running) --stats_.running;
  }
  job.sink->push({job.ticket, std::move(result)});
}

void JobQueue::count_zygote_start() {
  const std::lock_guard lock(mutex_);
  ++stats_.zygote_starts;
}

}  // namespace thor
