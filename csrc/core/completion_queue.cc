#include "thor/completion_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

namespace thor {

CompletionQueue::CompletionQueue() : event_fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (event_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

CompletionQueue::~CompletionQueue() { ::close(event_fd_); }

void CompletionQueue::push(Completion completion) {
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(completion));
    // Under the lock, so that a drain never leaves a signal without a completion behind it.
    ::eventfd_write(event_fd_, 1);
  }
  ready_.notify_all();
}

std::vector<Completion> CompletionQueue::take_locked() {
  eventfd_t ignored = 0;
  ::eventfd_read(event_fd_, &ignored);
  return std::exchange(waiting_, {});
}

std::vector<Completion> CompletionQueue::drain() {
  const std::lock_guard lock(mutex_);
  return take_locked();
}

std::vector<Completion> CompletionQueue::wait(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, timeout, [this] { return !waiting_.empty(); });
  return take_locked();
}

}  // namespace thor
