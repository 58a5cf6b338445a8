// Where results wait for whoever asked. One producer (the orchestrator's thread), any consumers.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "thor/execution.h"

namespace thor {

struct Completion {
  std::uint64_t ticket = 0;  // as Orchestrator::submit returned it
  Result result;
};

class CompletionQueue {
 public:
  CompletionQueue();
  ~CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;

  // An eventfd that is readable while completions wait: an event loop watches it.
  [[nodiscard]] int event_fd() const { return event_fd_; }

  void push(Completion completion);

  // Takes all that wait, possibly none; never blocks.
  std::vector<Completion> drain();

  // Blocks until something waits or `timeout` passes, then drains.
  std::vector<Completion> wait(std::chrono::milliseconds timeout);

 private:
  std::vector<Completion> take_locked();

  int event_fd_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<Completion> waiting_;
};

}  // namespace thor
