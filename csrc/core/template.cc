// The template: the warm interpreter's process, which makes jails and runs nothing else.
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <vector>

#include "core/cgroup.h"
#include "core/jail.h"
#include "core/protocol.h"
#include "thor/zygote.h"
#include "util/pidfd.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

class Template {
 public:
  Template(int control, const JailSpec& spec, const GuestHooks& hooks)
      : control_(control), plan_(plan_jails(spec)), hooks_(hooks), cgroup_path_(spec.cgroup_path) {}

  [[noreturn]] void serve(int parent_gone) {
    send_message(control_, {.kind = MessageKind::kReady});
    for (;;) {
      std::vector<pollfd> waits{{control_, POLLIN, 0}, {parent_gone, POLLIN, 0}};
      const std::size_t first_jail = waits.size();
      for (const Cloned& jail : jails_) waits.push_back({jail.pidfd.get(), POLLIN, 0});
      if (::poll(waits.data(), waits.size(), -1) < 0) continue;  // EINTR
      if (waits[1].revents != 0) leave();
      for (std::size_t i = waits.size(); i-- > first_jail;) {
        if (waits[i].revents != 0) reap(i - first_jail);
      }
      if (waits[0].revents != 0) take_request();
    }
  }

 private:
  void take_request() {
    Message request;
    std::vector<UniqueFd> fds;
    const Received got = receive_message(control_, &request, &fds);
    if (got == Received::kNothing) return;
    // The other end is gone, or does not speak our language: nothing here may outlive it.
    if (got == Received::kClosed || fds.empty()) leave();
    make_jail(request, std::move(fds));
  }

  void make_jail(const Message& request, std::vector<UniqueFd> fds) {
    const UniqueFd socket = std::move(fds[0]);
    const int cgroup = fds.size() > 1 ? fds[1].get() : -1;
    Cloned jail;
    hooks_.before_fork(hooks_.context);
    const SetupError error =
        clone_jail(plan_, request.uid_offset, cgroup, socket.get(), hooks_, &jail);
    hooks_.after_fork_parent(hooks_.context);
    if (error) {
      send_message(socket.get(), {.kind = MessageKind::kStartFailed, .error = error});
      return;
    }
    const int handle = jail.pidfd.get();
    send_message(socket.get(), {.kind = MessageKind::kJailMade}, {&handle, 1});
    jails_.push_back(std::move(jail));
  }

  void reap(std::size_t index) {
    int status = 0;
    ::waitpid(jails_[index].pid, &status, 0);
    jails_.erase(jails_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  // A zygote is pid 1 of its namespace: when it dies, the kernel has killed all in there before a
  // wait for it returns, so its control group can be removed.
  [[noreturn]] void leave() {
    for (const Cloned& jail : jails_) pidfd_signal(jail.pidfd.get(), SIGKILL);
    while (!jails_.empty()) reap(jails_.size() - 1);
    if (!cgroup_path_.empty()) remove_cgroup_tree(cgroup_path_);
    ::_exit(0);
  }

  int control_;
  JailPlan plan_;
  GuestHooks hooks_;
  std::string cgroup_path_;
  std::vector<Cloned> jails_;
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

// SIGTERM comes when our parent's thread dies: a fork of the parent may hold our socket open, so
// its closing cannot be relied on alone. Not SIGKILL: there is something to clean up.
SetupError watch_parent(UniqueFd* gone) {
  sigset_t term;
  sigemptyset(&term);
  sigaddset(&term, SIGTERM);
  ::sigprocmask(SIG_BLOCK, &term, nullptr);
  gone->reset(::signalfd(-1, &term, SFD_CLOEXEC));
  if (!*gone) return failed(SetupStep::kParentGone, 2);
  if (::prctl(PR_SET_PDEATHSIG, SIGTERM) != 0) return failed(SetupStep::kParentGone, 3);
  return {};
}

SetupError prepare(UniqueFd* parent_gone) {
  if (const SetupError e = watch_parent(parent_gone)) return e;
  return check_single_threaded();
}

}  // namespace

void serve_template(int control_fd, const JailSpec& jail, const GuestHooks& hooks) {
  const pid_t owner = ::getppid();
  UniqueFd parent_gone;
  const SetupError error = prepare(&parent_gone);
  if (::getppid() != owner) ::_exit(0);  // it died before we could be told
  if (error) {
    send_message(control_fd, {.kind = MessageKind::kStartFailed, .error = error});
    ::_exit(1);
  }
  Template(control_fd, jail, hooks).serve(parent_gone.get());
}

}  // namespace thor
