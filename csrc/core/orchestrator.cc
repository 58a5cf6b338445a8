#include "thor/orchestrator.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

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

// Sealed, because the snippet could otherwise grow it: memory that no limit counts.
UniqueFd memory_file(const std::string& data) {
  UniqueFd fd(::memfd_create("thor-input", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw system_failure("memfd_create");
  std::size_t done = 0;
  while (done < data.size()) {
    const ssize_t n = ::write(fd.get(), data.data() + done, data.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw system_failure("writing a memfd");
    done += static_cast<std::size_t>(n);
  }
  constexpr int kSeals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
  if (::lseek(fd.get(), 0, SEEK_SET) != 0 || ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    throw system_failure("sealing a memfd");
  }
  return fd;
}

std::pair<UniqueFd, UniqueFd> output_pipe() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw system_failure("pipe2");
  UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  if (::fcntl(read_end.get(), F_SETFL, O_NONBLOCK) != 0) throw system_failure("fcntl");
  return {std::move(read_end), std::move(write_end)};
}

}  // namespace

// Everything below `shared` is touched by the orchestrator's thread only.
class Orchestrator::Impl {
 public:
  explicit Impl(OrchestratorConfig config)
      : config_(std::move(config)), slots_(config_.slots), deadlines_(config_.slots) {
    if (config_.argv.empty()) throw StartError("argv is empty, expected an interpreter to start");
    if (config_.slots == 0) throw StartError("slots is 0, expected at least 1");
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!epoll_ || !wake_) throw StartError(system_failure("epoll or eventfd").what());
    watch(wake_.get(), tag(Source::kWake));
    thread_ = std::thread([this] { run(); });
    std::unique_lock lock(mutex_);
    started_.wait(lock, [this] { return state_ != State::kStarting; });
    if (state_ == State::kServing) return;
    const std::string reason = broken_reason_;
    lock.unlock();
    thread_.join();
    throw StartError(reason);
  }

  ~Impl() { close(); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink) {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kClosed) throw std::logic_error("the sandbox is closed");
    if (state_ == State::kBroken) throw StartError(broken_reason_);
    if (queue_.size() >= config_.queue_capacity) {
      throw QueueFull("the queue holds " + std::to_string(queue_.size()) +
                      " requests, its capacity");
    }
    const std::uint64_t ticket = ++next_ticket_;
    queue_.push_back({ticket, std::move(request), std::move(sink)});
    ++stats_.submitted;
    wake();
    return ticket;
  }

  void cancel(std::uint64_t ticket) {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(ticket);
    wake();
  }

  OrchestratorStats stats() {
    const std::lock_guard lock(mutex_);
    OrchestratorStats out = stats_;
    out.queued = queue_.size();
    return out;
  }

  void close() {
    {
      const std::lock_guard lock(mutex_);
      state_ = State::kClosed;
      wake();
    }
    const std::lock_guard joining(join_mutex_);
    if (thread_.joinable()) thread_.join();
  }

 private:
  enum class State : std::uint8_t { kStarting, kServing, kBroken, kClosed };

  void wake() { ::eventfd_write(wake_.get(), 1); }

  void watch(int fd, std::uint64_t about) {
    epoll_event event{.events = EPOLLIN, .data = {.u64 = about}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      throw system_failure("epoll_ctl");
    }
  }

  void run() {
    std::string reason;
    if (start_zygote(&reason)) {
      set_state(State::kServing, "");
      while (!closed()) step();
    } else {
      set_state(State::kBroken, reason);
    }
    stop_zygote();
    fail_everything(ending());
  }

  bool closed() {
    const std::lock_guard lock(mutex_);
    return state_ == State::kClosed || state_ == State::kBroken;
  }

  std::string ending() {
    const std::lock_guard lock(mutex_);
    return broken_reason_.empty() ? "the sandbox was closed" : broken_reason_;
  }

  void set_state(State state, const std::string& reason) {
    {
      const std::lock_guard lock(mutex_);
      if (state_ == State::kClosed) return;
      state_ = state;
      broken_reason_ = reason;
    }
    started_.notify_all();
  }

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
    {
      const std::lock_guard lock(mutex_);
      --stats_.running;
    }
    answer(slot->job, std::move(result));
  }

  void answer(const Job& job, Result result) {
    {
      const std::lock_guard lock(mutex_);
      ++stats_.completed;
    }
    job.sink->push({job.ticket, std::move(result)});
  }

  // --- the queue --------------------------------------------------------------------------------

  void cancel_requested() {
    std::vector<std::uint64_t> tickets;
    std::vector<Job> dropped;
    {
      const std::lock_guard lock(mutex_);
      tickets.swap(cancelled_);
      for (const std::uint64_t ticket : tickets) {
        const auto it = std::find_if(queue_.begin(), queue_.end(),
                                     [ticket](const Job& job) { return job.ticket == ticket; });
        if (it == queue_.end()) continue;
        dropped.push_back(std::move(*it));
        queue_.erase(it);
      }
    }
    for (const Job& job : dropped) answer(job, infra("cancelled by the caller"));
    for (const std::uint64_t ticket : tickets) {
      for (std::size_t i = 0; i < slots_.size(); ++i) {
        if (slots_[i] && slots_[i]->job.ticket == ticket) kill(i, KillReason::kCancelled);
      }
    }
  }

  void start_queued() {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]) continue;
      std::optional<Job> job = next_job();
      if (!job) return;
      try {
        start(i, std::move(*job));
      } catch (const std::system_error& e) {  // out of descriptors or memory
        finish(i, infra(std::string("preparing a snippet: ") + e.what()));
      }
    }
  }

  std::optional<Job> next_job() {
    const std::lock_guard lock(mutex_);
    if (queue_.empty()) return std::nullopt;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    ++stats_.running;
    return job;
  }

  void start(std::size_t index, Job job) {
    Slot& slot = slots_[index].emplace(std::move(job));
    const Request& request = slot.job.request;
    const UniqueFd payload = memory_file(request.payload);
    const UniqueFd input = request.stdin_data.empty()
                               ? UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC))
                               : memory_file(request.stdin_data);
    auto [stdout_read, stdout_write] = output_pipe();
    auto [stderr_read, stderr_write] = output_pipe();
    slot.stdout_read = std::move(stdout_read);
    slot.stderr_read = std::move(stderr_read);
    watch(slot.stdout_read.get(), tag(Source::kStdout, index));
    watch(slot.stderr_read.get(), tag(Source::kStderr, index));
    // Until the zygote answers, this watches the zygote itself.
    deadlines_.set(index, Clock::now() + config_.startup_timeout);
    const Message run{.kind = MessageKind::kRun,
                      .slot = static_cast<std::uint32_t>(index),
                      .limits = request.limits};
    const std::array<int, 4> fds{payload.get(), input.get(), stdout_write.get(),
                                 stderr_write.get()};
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
    const std::lock_guard lock(mutex_);
    ++stats_.zygote_starts;
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
    set_state(State::kBroken, reason.empty() ? why : reason);
  }

  void fail_everything(const std::string& why) {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i]) finish(i, infra(why));
    }
    std::deque<Job> left;
    {
      const std::lock_guard lock(mutex_);
      left.swap(queue_);
    }
    for (const Job& job : left) answer(job, infra(why));
  }

  const OrchestratorConfig config_;
  std::thread thread_;
  UniqueFd epoll_;
  UniqueFd wake_;
  std::mutex join_mutex_;

  std::mutex mutex_;  // guards what follows, up to the blank line
  std::condition_variable started_;
  State state_ = State::kStarting;
  std::string broken_reason_;
  std::deque<Job> queue_;
  std::vector<std::uint64_t> cancelled_;
  std::uint64_t next_ticket_ = 0;
  OrchestratorStats stats_;

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
