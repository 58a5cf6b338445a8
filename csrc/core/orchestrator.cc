#include "thor/orchestrator.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <future>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "core/fleet.h"
#include "core/job_queue.h"

namespace thor {
namespace {

void check(const OrchestratorConfig& config) {
  if (config.tiers.empty() || config.tiers.size() > kMaxTiers) {
    throw StartError("there are " + std::to_string(config.tiers.size()) + " tiers, expected 1 to " +
                     std::to_string(kMaxTiers));
  }
  for (const TierConfig& tier : config.tiers) {
    if (tier.argv.empty()) {
      throw StartError("argv of tier '" + tier.name + "' is empty, expected an interpreter");
    }
  }
  if (config.slots == 0) throw StartError("slots is 0, expected at least 1");
}

}  // namespace

// The thread that runs a Fleet; what callers share with it is in `jobs_`.
class Orchestrator::Impl {
 public:
  explicit Impl(OrchestratorConfig config)
      : config_(std::move(config)),
        jobs_(config_.queue_capacity, config_.max_dialogues),
        wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    check(config_);
    if (!wake_) throw StartError(std::generic_category().message(errno) + ": eventfd");
    std::promise<void> started;
    std::future<void> starting = started.get_future();
    // The promise is the thread's: it may still be in set_value() when we go on.
    thread_ = std::thread([this, told = std::move(started)]() mutable { run(&told); });
    starting.wait();
    if (serving()) return;
    thread_.join();
    throw StartError(jobs_.reason());
  }

  ~Impl() { close(); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink) {
    check_tier(request.tier);
    const std::uint64_t ticket = jobs_.submit(std::move(request), std::move(sink));
    wake();
    return ticket;
  }

  std::uint64_t open_dialogue(Request opening) { return jobs_.open_dialogue(std::move(opening)); }

  std::uint64_t step(std::uint64_t dialogue, std::string data, const Limits& limits,
                     std::uint32_t tier, std::shared_ptr<CompletionQueue> sink) {
    check_tier(tier);
    const std::uint64_t ticket =
        jobs_.submit_step(dialogue, std::move(data), limits, tier, std::move(sink));
    wake();
    return ticket;
  }

  void close_dialogue(std::uint64_t dialogue) {
    jobs_.close_dialogue(dialogue);
    wake();
  }

  void cancel(std::uint64_t ticket) {
    jobs_.cancel(ticket);
    wake();
  }

  [[nodiscard]] OrchestratorStats stats() const { return jobs_.stats(); }

  void close() {
    if (::getpid() != owner_) {
      // In a fork: the thread is not here to be joined, and what it owns is our parent's.
      if (thread_.joinable()) thread_.detach();
      return;
    }
    jobs_.set_state(JobQueue::State::kClosed);
    wake();
    const std::lock_guard joining(join_mutex_);
    if (thread_.joinable()) thread_.join();
    config_.cgroups.reset();  // empty now, so its directory can go
  }

 private:
  void wake() { ::eventfd_write(wake_.get(), 1); }
  [[nodiscard]] bool serving() const { return jobs_.state() == JobQueue::State::kServing; }

  void check_tier(std::uint32_t tier) const {
    if (tier < config_.tiers.size()) return;
    throw std::invalid_argument("tier is " + std::to_string(tier) + ", expected below " +
                                std::to_string(config_.tiers.size()));
  }

  void run(std::promise<void>* started) {
    std::string reason;
    bool told = false;
    try {
      Fleet fleet(config_, wake_.get(), &jobs_);
      told = fleet.start(&reason);
      jobs_.set_state(told ? JobQueue::State::kServing : JobQueue::State::kBroken, reason);
      if (told) started->set_value();
      while (serving()) {
        if (!fleet.turn(&reason)) jobs_.set_state(JobQueue::State::kBroken, reason);
      }
    } catch (const std::exception& e) {  // out of descriptors or memory
      jobs_.set_state(JobQueue::State::kBroken, std::string("the sandbox gave up: ") + e.what());
    }
    if (!told) started->set_value();
    reason = jobs_.reason();
    for (const Job& job : jobs_.take_all()) {
      jobs_.answer(job, infra(reason.empty() ? "the sandbox was closed" : reason));
    }
  }

  OrchestratorConfig config_;
  const pid_t owner_ = ::getpid();
  JobQueue jobs_;
  UniqueFd wake_;
  std::mutex join_mutex_;
  std::thread thread_;
};

Orchestrator::Orchestrator(OrchestratorConfig config)
    : impl_(std::make_unique<Impl>(std::move(config))) {}
Orchestrator::~Orchestrator() = default;

std::uint64_t Orchestrator::submit(Request request, std::shared_ptr<CompletionQueue> sink) {
  return impl_->submit(std::move(request), std::move(sink));
}
std::uint64_t Orchestrator::open_dialogue(Request opening) {
  return impl_->open_dialogue(std::move(opening));
}
std::uint64_t Orchestrator::step(std::uint64_t dialogue, std::string data, const Limits& limits,
                                 std::uint32_t tier, std::shared_ptr<CompletionQueue> sink) {
  return impl_->step(dialogue, std::move(data), limits, tier, std::move(sink));
}
void Orchestrator::close_dialogue(std::uint64_t dialogue) { impl_->close_dialogue(dialogue); }
void Orchestrator::cancel(std::uint64_t ticket) { impl_->cancel(ticket); }
OrchestratorStats Orchestrator::stats() const { return impl_->stats(); }
void Orchestrator::close() { impl_->close(); }

}  // namespace thor
