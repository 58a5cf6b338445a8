#include "thor/zygote.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <new>
#include <vector>

#include "core/capabilities.h"
#include "core/child_setup.h"
#include "core/jail.h"
#include "core/mounts.h"
#include "core/protocol.h"
#include "core/seccomp_filter.h"
#include "util/kernel_abi.h"
#include "util/pidfd.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

// Order of the descriptors that come with kRun.
enum FdIndex : std::size_t { kPayloadFd, kStdinFd, kStdoutFd, kStderrFd, kFdCount };

// Written by init and read by the zygote after init's death; the snippet unmaps it before it runs.
struct InitReport {
  SetupError error;
  std::int32_t snippet_status = -1;
  Usage usage;
};

// Its own page, because the snippet keeps it: all it can say is that an allocation failed.
struct GuestHint {
  volatile bool out_of_memory = false;
};

template <typename T>
T* map_shared() {
  void* page =
      ::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return page == MAP_FAILED ? nullptr : new (page) T();
}

template <typename T>
void unmap(T* shared) {
  ::munmap(shared, sizeof(T));
}

struct Child {
  std::uint32_t slot = 0;
  pid_t pid = 0;
  UniqueFd pidfd;
  InitReport* report = nullptr;
  GuestHint* hint = nullptr;
};

Usage to_usage(const rusage& r) {
  const auto ns = [](const timeval& t) {
    return std::int64_t{t.tv_sec} * 1'000'000'000 + std::int64_t{t.tv_usec} * 1'000;
  };
  return {ns(r.ru_utime) + ns(r.ru_stime), std::int64_t{r.ru_maxrss} * 1024};
}

bool read_all(int fd, std::string* out) {
  std::vector<char> chunk(std::size_t{1} << 16);
  for (;;) {
    const ssize_t n = ::read(fd, chunk.data(), chunk.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    if (n == 0) return true;
    out->append(chunk.data(), static_cast<std::size_t>(n));
  }
}

class Zygote {
 public:
  Zygote(int control, const JailSpec& jail, const GuestHooks& hooks)
      : control_(control), hooks_(hooks) {
    plan_.shadowed = paths_under_tmp(jail.readonly_paths);
    plan_.filter = build_seccomp_filter();
    plan_.baseline = measure_memory_baseline();
  }

  [[noreturn]] void serve() {
    send_message(control_, {.kind = MessageKind::kReady});
    for (;;) {
      std::vector<pollfd> waits{{control_, POLLIN, 0}};
      for (const Child& child : children_) waits.push_back({child.pidfd.get(), POLLIN, 0});
      if (::poll(waits.data(), waits.size(), -1) < 0) continue;  // EINTR
      if (waits[0].revents != 0) take_request();
      for (std::size_t i = waits.size(); i-- > 1;) {
        if (waits[i].revents != 0) reap(i - 1);
      }
    }
  }

 private:
  void take_request() {
    Message request;
    std::vector<UniqueFd> fds;
    const Received got = receive_message(control_, &request, &fds);
    if (got == Received::kNothing) return;
    // The other end is gone, or does not speak our language: nothing here may outlive it.
    if (got == Received::kClosed || fds.size() != kFdCount) ::_exit(0);
    start(request, fds);
  }

  void start(const Message& request, const std::vector<UniqueFd>& fds) {
    Child child{.slot = request.slot,
                .pid = 0,
                .pidfd = UniqueFd(),
                .report = map_shared<InitReport>(),
                .hint = map_shared<GuestHint>()};
    if (child.report == nullptr || child.hint == nullptr) {
      return refuse(request.slot, failed(SetupStep::kReportPage));
    }
    hooks_.before_fork(hooks_.context);
    int pidfd = -1;
    child.pid = fork_into(snippet_namespaces(), &pidfd);
    if (child.pid == 0) run_init(request, fds, child);
    const SetupError clone_error = failed(SetupStep::kClone);
    hooks_.after_fork_parent(hooks_.context);
    if (child.pid < 0) {
      unmap(child.report);
      unmap(child.hint);
      return refuse(request.slot, clone_error);
    }
    child.pidfd.reset(pidfd);
    const Message started{.kind = MessageKind::kStarted, .slot = request.slot};
    const int handle = child.pidfd.get();
    if (!send_message(control_, started, {&handle, 1})) ::_exit(0);
    children_.push_back(std::move(child));
  }

  void refuse(std::uint32_t slot, const SetupError& error) const {
    const Message exited{.kind = MessageKind::kExited, .slot = slot, .error = error};
    if (!send_message(control_, exited)) ::_exit(0);
  }

  void reap(std::size_t index) {
    Child& child = children_[index];
    int status = 0;
    rusage usage{};
    if (::wait4(child.pid, &status, 0, &usage) != child.pid) return;
    // An init that was killed wrote no report: its own usage includes its reaped descendants.
    const bool reported = child.report->snippet_status != -1;
    const Message exited{.kind = MessageKind::kExited,
                         .slot = child.slot,
                         .error = child.report->error,
                         .snippet_status = child.report->snippet_status,
                         .init_status = status,
                         .out_of_memory = child.hint->out_of_memory,
                         .usage = reported ? child.report->usage : to_usage(usage)};
    unmap(child.report);
    unmap(child.hint);
    children_.erase(children_.begin() + static_cast<std::ptrdiff_t>(index));
    if (!send_message(control_, exited)) ::_exit(0);
  }

  // Pid 1 of the new namespaces: prepares them, starts the snippet, reaps until it ends. When it
  // exits, the kernel kills whatever the snippet left behind. Asked to stop (SIGTERM), it kills
  // the snippet and still reports what that used; SIGKILL would lose the report.
  [[noreturn]] void run_init(const Message& request, const std::vector<UniqueFd>& fds,
                             const Child& child) {
    child.report->error =
        prepare_init(plan_, {fds[kStdinFd].get(), fds[kStdoutFd].get(), fds[kStderrFd].get()},
                     fds[kPayloadFd].get());
    if (child.report->error) ::_exit(1);
    ::prctl(PR_SET_DUMPABLE, 0);  // the snippet has our uid: it must not look into us
    struct sigaction stop{};
    stop.sa_handler = [](int) { ::kill(-1, SIGKILL); };
    ::sigaction(SIGTERM, &stop, nullptr);
    const pid_t snippet = ::fork();
    if (snippet < 0) {
      child.report->error = failed(SetupStep::kForkSnippet);
      ::_exit(1);
    }
    if (snippet == 0) run_snippet(request, child);
    drop_capabilities();
    ::syscall(kSysCloseRange, 0U, ~0U, 0U);
    for (;;) {
      int status = 0;
      rusage usage{};
      const pid_t gone = ::wait4(-1, &status, __WALL, &usage);
      if (gone == snippet) {
        child.report->usage = to_usage(usage);
        child.report->snippet_status = status;
        ::_exit(0);
      }
      if (gone < 0 && errno != EINTR) ::_exit(1);
    }
  }

  [[noreturn]] void run_snippet(const Message& request, const Child& child) {
    constexpr int kPayload = 3;  // where prepare_init put it
    std::string payload;
    ::prctl(PR_SET_DUMPABLE, 1);  // undumpable, /proc/self would not be its own
    const SetupError error = read_all(kPayload, &payload) ? confine_snippet(plan_, request.limits)
                                                          : failed(SetupStep::kPayload);
    if (error) {
      child.report->error = error;
      ::_exit(1);
    }
    ::close(kPayload);
    struct sigaction initial{};
    initial.sa_handler = SIG_DFL;
    ::sigaction(SIGTERM, &initial, nullptr);
    unmap(child.report);
    hooks_.after_fork_child(hooks_.context);
    ::_exit(hooks_.run(hooks_.context, payload, &child.hint->out_of_memory));
  }

  int control_;
  GuestHooks hooks_;
  ChildPlan plan_;
  std::vector<Child> children_;
};

// A fork copies one thread; locks the others held would stay locked in every child.
SetupError check_single_threaded() {
  std::error_code error;
  int threads = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task", error)) {
    static_cast<void>(entry);
    ++threads;
  }
  return threads == 1 ? SetupError{} : SetupError{SetupStep::kSingleThread, EBUSY, threads};
}

}  // namespace

void serve_zygote(int control_fd, const JailSpec& jail, const GuestHooks& hooks) {
  SetupError error = check_single_threaded();
  if (!error) error = enter_jail(jail);
  if (error) {
    send_message(control_fd, {.kind = MessageKind::kStartFailed, .error = error});
    ::_exit(1);
  }
  Zygote(control_fd, jail, hooks).serve();
}

}  // namespace thor
