#include "core/zygote.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "core/capabilities.h"
#include "core/collect.h"
#include "core/protocol.h"
#include "core/rlimits.h"
#include "core/tree_watch.h"
#include "util/kernel_abi.h"

namespace thor {
namespace {

// First to go when memory runs out is the snippet: never the trainer, and not the zygote either. A
// fork inherits the score, so the zygote has the high one only while it forks: for the child to
// open its own file in /proc would take longer than all the rest of its set-up.
constexpr std::string_view kSnippetOomScore = "1000";
// While a snippet runs: how often orphans are reaped and, without a control group, memory is added
// up. A process can touch new memory at about 1 GB/s.
constexpr int kTickMs = 50;
constexpr int kIdleMs = 1'000;  // until somebody wakes us, which only watching needs

// A child's word to its zygote; it unmaps the page before the snippet runs.
struct Report {
  SetupError error;
  bool started = false;
  std::uint64_t memory_bytes = 0;
  std::array<char, kMaxCollectBytes> collect{};  // NUL-ended paths, then an empty one
};

// A page of its own, because the snippet keeps it: all it can say is that an allocation failed.
struct Hint {
  volatile bool out_of_memory = false;
};

template <typename T>
T* map_shared() {
  static_assert(sizeof(T) <= 4'096, "fits the smallest page there is");
  void* page =
      ::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return page == MAP_FAILED ? nullptr : new (page) T();
}

struct Pipe {
  UniqueFd read_end;
  UniqueFd write_end;
};

bool make_output_pipe(Pipe* pipe) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) return false;
  pipe->read_end.reset(ends[0]);
  pipe->write_end.reset(ends[1]);
  return true;
}

std::int64_t to_ns(const timeval& t) {
  return std::int64_t{t.tv_sec} * 1'000'000'000 + std::int64_t{t.tv_usec} * 1'000;
}

void add(const rusage& r, Usage* total) {
  total->cpu_ns += to_ns(r.ru_utime) + to_ns(r.ru_stime);
  total->peak_bytes = std::max(total->peak_bytes, std::int64_t{r.ru_maxrss} * 1024);
}

bool read_all(int fd, std::string* out) {
  std::array<char, 1 << 16> chunk;
  for (;;) {
    const ssize_t n = ::read(fd, chunk.data(), chunk.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n == 0;
    out->append(chunk.data(), static_cast<std::size_t>(n));
  }
}

class Zygote {
 public:
  Zygote(const JailPlan& plan, std::uint32_t layers, JailFiles files, const GuestHooks& hooks)
      : plan_(plan),
        layers_(layers),
        files_(std::move(files)),
        hooks_(hooks),
        report_(map_shared<Report>()),
        hint_(map_shared<Hint>()) {
    if (report_ == nullptr || hint_ == nullptr) give_up(failed(SetupStep::kSharedPages));
    // Pid 1 only gets signals that it handles: an interpreter's handler for Ctrl-C would let a
    // snippet interrupt us, and the next snippet find it pending. Children get it back.
    struct sigaction ignore_nothing{};
    ignore_nothing.sa_handler = SIG_DFL;
    ::sigaction(SIGINT, &ignore_nothing, &interrupt_);
    oom_score_.reset(::openat(files_.full_proc.get(), "self/oom_score_adj", O_RDWR | O_CLOEXEC));
    std::array<char, 16> text{};
    const ssize_t n = ::pread(oom_score_.get(), text.data(), text.size(), 0);
    if (n <= 0) give_up(failed(SetupStep::kOomScore, 0));
    own_oom_score_.assign(text.data(), static_cast<std::size_t>(n));
    // For the children, which start where we are.
    if (::chdir(kWorkingDirectory) != 0) give_up(failed(SetupStep::kWorkingDirectory, 1));
    ::prctl(PR_SET_DUMPABLE, 0);  // unprivileged, the snippet has our uid: it must not look into us
  }

  [[noreturn]] void serve() {
    for (;;) {
      const pid_t child = park();
      Message exited = await_end(child);
      // A child that took no request may have left one in the socket, which is not the next one's.
      exited.pristine = exited.started && !exited.error && pristine();
      std::vector<UniqueFd> files;
      if (exited.started) files = collect_files(report_->collect.data(), &exited.collected);
      std::vector<int> handles;
      for (const UniqueFd& file : files) handles.push_back(file.get());
      if (!send_message(kControlFd, exited, handles) || !exited.pristine) ::_exit(0);
    }
  }

 private:
  // Forks the next child and shows it to the orchestrator, which will talk to it directly.
  pid_t park() {
    *report_ = Report{};
    // All of the page: a snippet could leave a message behind what we use of it.
    std::memset(static_cast<void*>(hint_), 0, static_cast<std::size_t>(::getpagesize()));
    refresh_guest();
    // Every snippet is pid 2: how many processes the one before it had is not for it to know.
    if (files_.last_pid) static_cast<void>(::pwrite(files_.last_pid.get(), "1", 1, 0));
    Pipe out;
    Pipe err;
    if (!make_output_pipe(&out) || !make_output_pipe(&err)) give_up(failed(SetupStep::kPipes));
    set_oom_score(kSnippetOomScore);
    const pid_t child = ::fork();
    if (child == 0) live(out, err);
    set_oom_score(own_oom_score_);
    if (child < 0) give_up(failed(SetupStep::kForkSnippet));
    pidfd_.reset(static_cast<int>(::syscall(kSysPidfdOpen, child, 0)));
    const Message parked{.kind = MessageKind::kParked, .layers = layers_};
    const std::array<int, 3> fds{pidfd_.get(), out.read_end.get(), err.read_end.get()};
    if (!send_message(kControlFd, parked, fds)) ::_exit(0);
    return child;
  }

  void refresh_guest() const {
    std::uint64_t seed = 0;
    if (::getrandom(&seed, sizeof(seed), 0) != sizeof(seed)) give_up(failed(SetupStep::kSeed));
    hooks_.refresh(hooks_.context, seed);
  }

  void set_oom_score(std::string_view score) const {
    if (::pwrite(oom_score_.get(), score.data(), score.size(), 0) < 0) {
      give_up(failed(SetupStep::kOomScore, 1));
    }
  }

  [[noreturn]] static void give_up(const SetupError& error) {
    send_message(kControlFd, {.kind = MessageKind::kStartFailed, .error = error});
    ::_exit(1);
  }

  Message await_end(pid_t child) {
    Message exited{.kind = MessageKind::kExited};
    bool over = false;
    while (!over) {
      // Events 0: only a hang-up wakes us; what is sent is for the child.
      std::array<pollfd, 2> waits{{{kControlFd, 0, 0}, {pidfd_.get(), POLLIN, 0}}};
      const int timeout = report_->started ? kTickMs : kIdleMs;
      ::poll(waits.data(), waits.size(), timeout);
      if (waits[0].revents != 0) ::_exit(0);  // the kernel takes the whole namespace with us
      over = reap(child, &exited);
      if (!over && exceeds_memory()) {
        exited.tree_out_of_memory = true;
        ::kill(-1, SIGKILL);
      }
    }
    empty_namespace(&exited);
    exited.error = report_->error;
    exited.started = report_->started;
    exited.out_of_memory = hint_->out_of_memory;
    return exited;
  }

  // Takes all that is dead by now; orphans come to us. True once the main process is among them.
  static bool reap(pid_t child, Message* exited) {
    for (;;) {
      int status = 0;
      rusage usage{};
      const pid_t gone = ::wait4(-1, &status, WNOHANG | __WALL, &usage);
      if (gone <= 0) return false;
      add(usage, &exited->usage);
      if (gone == child) {
        exited->snippet_status = status;
        return true;
      }
    }
  }

  // kill(-1) reaches all but us at one moment, forks in progress included, and what they leave is
  // ours to wait for. When nobody is left to wait for, nobody is left.
  static void empty_namespace(Message* exited) {
    bool killed = false;
    for (;;) {
      int status = 0;
      rusage usage{};
      const pid_t gone = ::wait4(-1, &status, __WALL | (killed ? 0 : WNOHANG), &usage);
      if (gone > 0) {
        add(usage, &exited->usage);
      } else if (gone == 0) {
        ::kill(-1, SIGKILL);
        killed = true;
      } else if (errno != EINTR) {
        return;
      }
    }
  }

  [[nodiscard]] bool exceeds_memory() const {
    if (plan_.spec.memory_cgroup || !report_->started) return false;
    return tree_memory_bytes(private_memory_bytes(1)) > report_->memory_bytes;
  }

  // A socket that was sent over another in a ring outlives its processes until the kernel collects
  // it, and its abstract name with it: the next snippet could read it.
  [[nodiscard]] bool no_socket_left() const {
    std::array<char, 64> text{};
    const ssize_t n = ::pread(files_.sockets.get(), text.data(), text.size(), 0);
    return n > 0 && std::string_view(text.data(), static_cast<std::size_t>(n))
                        .starts_with("sockets: used 0\n");
  }

  // Without one of these walls there are places for traces that nobody looks at.
  [[nodiscard]] bool may_be_reused() const {
    constexpr std::uint32_t kNeeded =
        bit(Layer::kSeccomp) | bit(Layer::kNetwork) | bit(Layer::kIpc);
    return (layers_ & kNeeded) == kNeeded;
  }

  [[nodiscard]] bool pristine() const {
    return may_be_reused() && no_socket_left() &&
           std::all_of(files_.writable.begin(), files_.writable.end(),
                       [](const PristineDirectory& d) { return d.untouched(); });
  }

  // --- in the child -----------------------------------------------------------------------------

  [[noreturn]] void live(const Pipe& out, const Pipe& err) {
    ::sigaction(SIGINT, &interrupt_, nullptr);
    if (const SetupError e = give_up_privileges()) fail(e);
    Message run;
    std::string payload;
    std::vector<UniqueFd> fds;
    Received got = Received::kNothing;
    while (got == Received::kNothing) got = receive_message(kControlFd, &run, &fds, &payload);
    if (got == Received::kClosed) ::_exit(0);
    if (run.collect_bytes > 0) {
      const std::size_t n = std::min<std::size_t>(run.collect_bytes, kMaxCollectBytes - 1);
      std::copy_n(payload.data(), n, report_->collect.data());
      payload.erase(0, run.collect_bytes);
    }
    report_->memory_bytes = run.limits.memory_bytes;
    report_->started = true;
    std::size_t next = 0;
    if (run.payload_is_file) {
      payload.clear();
      if (!read_all(fds[next++].get(), &payload)) fail(failed(SetupStep::kPayload));
    }
    const int input = run.has_stdin ? fds[next++].get() : -1;
    const int dialogue = run.has_dialogue ? fds[next].get() : -1;
    if (const SetupError e = arrange_fds(input, out, err, dialogue)) fail(e);
    for (UniqueFd& fd : fds) static_cast<void>(fd.release());  // closed with the rest just now
    if (const SetupError e = apply_rlimits(run.limits, plan_.baseline, plan_.processes_of_ours))
      fail(e);
    ::munmap(report_, sizeof(Report));
    const GuestJob job{.payload = std::move(payload),
                       .out_of_memory = &hint_->out_of_memory,
                       .has_dialogue = run.has_dialogue};
    ::_exit(hooks_.run(hooks_.context, job));
  }

  [[noreturn]] void fail(const SetupError& error) {
    report_->error = error;
    ::_exit(1);
  }

  // After it nothing can be undone.
  static SetupError give_up_privileges() {
    if (::setsid() < 0) return failed(SetupStep::kSession);
    if (::setresgid(kSnippetUid, kSnippetUid, kSnippetUid) != 0 ||
        ::setresuid(kSnippetUid, kSnippetUid, kSnippetUid) != 0) {
      return failed(SetupStep::kSetIds, 5);
    }
    if (const SetupError e = drop_capabilities()) return e;
    // Undumpable as the zygote, /proc/self would not be the snippet's own.
    if (::prctl(PR_SET_DUMPABLE, 1) != 0) return failed(SetupStep::kSetIds, 6);
    return {};
  }

  // 0, 1, 2 and, for a dialogue, 3; nothing else is open afterwards.
  static SetupError arrange_fds(int input, const Pipe& out, const Pipe& err, int dialogue) {
    // Never one that an earlier snippet had: flags and locks belong to what was opened once.
    const int empty = input < 0 ? ::open("/dev/null", O_RDONLY | O_CLOEXEC) : input;
    const std::array<int, 3> sources{empty, out.write_end.get(), err.write_end.get()};
    for (int target = 0; target < 3; ++target) {
      if (::dup2(sources[static_cast<std::size_t>(target)], target) != target) {
        return failed(SetupStep::kFileDescriptors, target);
      }
    }
    unsigned first_unwanted = kDialogueFd;
    if (dialogue >= 0) {
      if (::dup2(dialogue, kDialogueFd) != kDialogueFd) {
        return failed(SetupStep::kFileDescriptors, kDialogueFd);
      }
      ++first_unwanted;
    }
    if (::syscall(kSysCloseRange, first_unwanted, ~0U, 0U) != 0) {
      return failed(SetupStep::kFileDescriptors, 4);
    }
    return {};
  }

  const JailPlan& plan_;
  const std::uint32_t layers_;
  const JailFiles files_;
  const GuestHooks& hooks_;
  Report* const report_;
  Hint* const hint_;
  struct sigaction interrupt_{};
  UniqueFd oom_score_;  // of the zygote itself
  std::string own_oom_score_;
  UniqueFd pidfd_;
};

}  // namespace

void serve_snippets(const JailPlan& plan, std::uint32_t layers, JailFiles files,
                    const GuestHooks& hooks) {
  Zygote(plan, layers, std::move(files), hooks).serve();
}

}  // namespace thor
