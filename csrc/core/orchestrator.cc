#include "thor/orchestrator.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <future>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "core/handover.h"
#include "core/job_queue.h"
#include "core/slot.h"
#include "core/spawn.h"
#include "util/pidfd.h"

namespace thor {
namespace {

// What an epoll event is about: the low half is a slot where the high half says so.
enum class Source : std::uint32_t { kWake, kControl, kStdout, kStderr };

std::uint64_t tag(Source source, std::size_t slot = 0) {
  return (std::uint64_t{static_cast<std::uint32_t>(source)} << 32) | slot;
}

// A zygote that dies this often without having run anything in between will not get better.
constexpr int kMaxFailedStarts = 5;
constexpr std::chrono::milliseconds kStartTurn{50};   // how soon a close() during start is noticed
constexpr std::chrono::milliseconds kKillGrace{200};  // for init to kill and report
constexpr std::chrono::milliseconds kStopGrace{2'000};  // thousands of times what an exit takes

std::system_error system_failure(const char* what) {
  return {errno, std::generic_category(), what};
}

// False if `timeout` passed with nothing to read (a pidfd is readable once the process is gone).
bool wait_readable(int fd, std::chrono::milliseconds timeout) {
  pollfd wait{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&wait, 1, static_cast<int>(timeout.count())) > 0;
}

}  // namespace

// The thread and all that only it touches; what callers share with it is in `jobs_`.
class Orchestrator::Impl {
 public:
  explicit Impl(OrchestratorConfig config)
      : config_(std::move(config)),
        jobs_(config_.queue_capacity),
        slots_(config_.slots),
        deadlines_(config_.slots) {
    if (config_.argv.empty()) throw StartError("argv is empty, expected an interpreter to start");
    if (config_.slots == 0) throw StartError("slots is 0, expected at least 1");
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!epoll_ || !wake_) throw StartError(system_failure("epoll or eventfd").what());
    watch(wake_.get(), tag(Source::kWake));
    std::promise<void> started;
    std::future<void> starting = started.get_future();
    thread_ = std::thread([this, &started] { run(&started); });
    starting.wait();
    if (jobs_.state() == JobQueue::State::kServing) return;
    thread_.join();
    throw StartError(jobs_.reason());
  }

  ~Impl() { close(); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink) {
    const std::uint64_t ticket = jobs_.submit(std::move(request), std::move(sink));
    wake();
    return ticket;
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
  }

 private:
  void wake() { ::eventfd_write(wake_.get(), 1); }

  void watch(int fd, std::uint64_t about) {
    epoll_event event{.events = EPOLLIN, .data = {.u64 = about}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      throw system_failure("epoll_ctl");
    }
  }

  void run(std::promise<void>* started) {
    std::string reason;
    if (start_zygote(&reason)) {
      jobs_.set_state(JobQueue::State::kServing);
    } else {
      jobs_.set_state(JobQueue::State::kBroken, reason);
    }
    started->set_value();
    while (serving()) step();
    stop_zygote();
    reason = jobs_.reason();
    fail_everything(reason.empty() ? "the sandbox was closed" : reason);
  }

  [[nodiscard]] bool serving() const { return jobs_.state() == JobQueue::State::kServing; }
  [[nodiscard]] bool closed() const { return jobs_.state() == JobQueue::State::kClosed; }

  // --- one turn of the loop ---------------------------------------------------------------------

  void step() {
    std::array<epoll_event, 64> events{};
    const int timeout = deadlines_.poll_timeout_ms(Clock::now());
    const int n = ::epoll_wait(epoll_.get(), events.data(), events.size(), timeout);
    for (int i = 0; i < n; ++i) handle(events[static_cast<std::size_t>(i)].data.u64);
    while (const auto slot = deadlines_.expired(Clock::now())) on_deadline(*slot);
    cancel_requested();
    start_queued();
  }

  void handle(std::uint64_t about) {
    const auto slot = static_cast<std::size_t>(about & 0xffffffffU);
    switch (static_cast<Source>(about >> 32)) {
      case Source::kWake: {
        eventfd_t ignored = 0;
        ::eventfd_read(wake_.get(), &ignored);
        break;
      }
      case Source::kControl: on_control(); break;
      case Source::kStdout:
      case Source::kStderr: on_output(slot); break;
    }
  }

  void on_control() {
    for (;;) {
      Message message;
      std::vector<UniqueFd> fds;
      switch (receive_message(zygote_.control.get(), &message, &fds)) {
        case Received::kNothing: return;
        case Received::kClosed: return restart_zygote("the zygote died");
        case Received::kMessage: break;
      }
      if (message.slot >= slots_.size() || !slots_[message.slot]) continue;
      if (message.kind == MessageKind::kStarted && fds.size() == 1) {
        on_started(message.slot, std::move(fds[0]));
      } else if (message.kind == MessageKind::kExited) {
        on_exited(message);
      }
    }
  }

  void on_started(std::size_t index, UniqueFd pidfd) {
    Slot& slot = *slots_[index];
    slot.pidfd = std::move(pidfd);
    slot.started = Clock::now();
    deadlines_.set(index, slot.started + slot.job.request.limits.timeout);
    if (slot.killed != KillReason::kNone) stop(index);  // cancelled meanwhile
  }

  void on_output(std::size_t index) {
    if (slots_[index] && !slots_[index]->drain_output()) kill(index, KillReason::kOutput);
  }

  void on_deadline(std::size_t index) {
    Slot& slot = *slots_[index];
    if (!slot.pidfd) return restart_zygote("the zygote did not start a snippet in time");
    if (slot.killed == KillReason::kNone) return kill(index, KillReason::kTimeout);
    pidfd_signal(slot.pidfd.get(), SIGKILL);  // asked to stop and did not
  }

  void on_exited(const Message& exited) {
    failed_starts_ = 0;
    Slot& slot = *slots_[exited.slot];
    // All writers are dead, so what the pipes hold now is all there will ever be.
    slot.drain_output();
    finish(exited.slot, conclude(slot, exited, Clock::now()));
  }

  void kill(std::size_t index, KillReason reason) {
    Slot& slot = *slots_[index];
    if (slot.killed != KillReason::kNone) return;
    slot.killed = reason;
    if (slot.pidfd) stop(index);
  }

  void stop(std::size_t index) {
    pidfd_signal(slots_[index]->pidfd.get(), SIGTERM);
    deadlines_.set(index, Clock::now() + kKillGrace);
  }

  void finish(std::size_t index, Result result) {
    const std::optional<Slot> slot = std::exchange(slots_[index], std::nullopt);
    deadlines_.clear(index);
    jobs_.answer(slot->job, std::move(result), true);
  }

  // --- the queue --------------------------------------------------------------------------------

  void cancel_requested() {
    const JobQueue::Cancellations cancelled = jobs_.take_cancellations();
    for (const Job& job : cancelled.waiting) {
      jobs_.answer(job, infra("cancelled by the caller"), false);
    }
    for (const std::uint64_t ticket : cancelled.others) {
      for (std::size_t i = 0; i < slots_.size(); ++i) {
        if (slots_[i] && slots_[i]->job.ticket == ticket) kill(i, KillReason::kCancelled);
      }
    }
  }

  void start_queued() {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]) continue;
      std::optional<Job> job = jobs_.next();
      if (!job) return;
      try {
        start(i, std::move(*job));
      } catch (const std::system_error& e) {  // out of descriptors or memory
        finish(i, infra(std::string("preparing a snippet: ") + e.what()));
      }
    }
  }

  void start(std::size_t index, Job job) {
    Slot& slot = slots_[index].emplace(std::move(job));
    const Request& request = slot.job.request;
    const UniqueFd payload = input_file(request.payload);
    const UniqueFd input = request.stdin_data.empty()
                               ? UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC))
                               : input_file(request.stdin_data);
    OutputPipe standard_output = output_pipe();
    OutputPipe standard_error = output_pipe();
    slot.stdout_read = std::move(standard_output.read_end);
    slot.stderr_read = std::move(standard_error.read_end);
    watch(slot.stdout_read.get(), tag(Source::kStdout, index));
    watch(slot.stderr_read.get(), tag(Source::kStderr, index));
    // Until the zygote answers, this watches the zygote itself.
    deadlines_.set(index, Clock::now() + config_.startup_timeout);
    const Message run{.kind = MessageKind::kRun,
                      .slot = static_cast<std::uint32_t>(index),
                      .limits = request.limits};
    const std::array<int, 4> fds{payload.get(), input.get(), standard_output.write_end.get(),
                                 standard_error.write_end.get()};
    if (!send_message(zygote_.control.get(), run, fds)) {
      if (errno == EPIPE || errno == ECONNRESET) return;  // its death is reported by the socket
      throw system_failure("sending to the zygote");
    }
  }

  // --- the zygote's life ------------------------------------------------------------------------

  bool start_zygote(std::string* reason) {
    try {
      zygote_ = spawn_zygote(config_.argv, config_.env);
      if (!await_ready(reason)) return false;
      watch(zygote_.control.get(), tag(Source::kControl));
    } catch (const std::system_error& e) {
      *reason = std::string("the sandbox's zygote could not be started: ") + e.what();
      return false;
    }
    jobs_.count_zygote_start();
    return true;
  }

  bool await_ready(std::string* reason) {
    const Clock::time_point deadline = Clock::now() + config_.startup_timeout;
    Message message;
    std::vector<UniqueFd> fds;
    Received got = Received::kNothing;
    while (got == Received::kNothing) {
      if (closed()) return false;
      if (Clock::now() > deadline) {
        *reason = "the sandbox's zygote was not ready after " +
                  std::to_string(config_.startup_timeout.count()) + " ms";
        return false;
      }
      got = receive_message(zygote_.control.get(), &message, &fds);
      if (got == Received::kNothing) wait_readable(zygote_.control.get(), kStartTurn);
    }
    if (got == Received::kMessage && message.kind == MessageKind::kReady) return true;
    *reason = "the sandbox's zygote did not start: " +
              (got == Received::kMessage ? describe(message.error) : read_messages(zygote_));
    return false;
  }

  void stop_zygote() {
    if (zygote_.pid < 0) return;
    // The zygote exits when its socket closes, and its pid namespace, every snippet included, with
    // it; the process we started exits only after that. Killing is for one that is stuck.
    zygote_.control.reset();
    if (!wait_readable(zygote_.pidfd.get(), kStopGrace)) pidfd_signal(zygote_.pidfd.get(), SIGKILL);
    int status = 0;
    while (::waitpid(zygote_.pid, &status, 0) < 0 && errno == EINTR) {
    }
    zygote_ = Spawned{};
  }

  void restart_zygote(const std::string& why) {
    const std::string messages = read_messages(zygote_);
    stop_zygote();
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]) finish(i, infra(why + (messages.empty() ? "" : ": " + messages)));
    }
    std::string reason;
    while (++failed_starts_ <= kMaxFailedStarts) {
      if (closed() || start_zygote(&reason)) return;
      stop_zygote();
    }
    jobs_.set_state(JobQueue::State::kBroken, reason.empty() ? why : reason);
  }

  void fail_everything(const std::string& why) {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]) finish(i, infra(why));
    }
    for (const Job& job : jobs_.take_all()) jobs_.answer(job, infra(why), false);
  }

  const OrchestratorConfig config_;
  const pid_t owner_ = ::getpid();
  JobQueue jobs_;
  UniqueFd epoll_;
  UniqueFd wake_;
  std::mutex join_mutex_;
  std::thread thread_;

  // The thread's own.
  std::vector<std::optional<Slot>> slots_;
  Deadlines deadlines_;
  Spawned zygote_;
  int failed_starts_ = 0;
};

Orchestrator::Orchestrator(OrchestratorConfig config)
    : impl_(std::make_unique<Impl>(std::move(config))) {}
Orchestrator::~Orchestrator() = default;

std::uint64_t Orchestrator::submit(Request request, std::shared_ptr<CompletionQueue> sink) {
  return impl_->submit(std::move(request), std::move(sink));
}
void Orchestrator::cancel(std::uint64_t ticket) { impl_->cancel(ticket); }
OrchestratorStats Orchestrator::stats() const { return impl_->stats(); }
void Orchestrator::close() { impl_->close(); }

}  // namespace thor
