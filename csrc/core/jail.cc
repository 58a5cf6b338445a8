#include "core/jail.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <string>
#include <string_view>

#include "core/capabilities.h"
#include "core/id_maps.h"
#include "core/landlock.h"
#include "core/mounts.h"
#include "core/protocol.h"
#include "core/seccomp_filter.h"
#include "core/time_namespace.h"
#include "core/zygote.h"
#include "util/kernel_abi.h"
#include "util/pidfd.h"

namespace thor {
namespace {

// Who jails are to the host when we start as root: never its root, and each snippet's jail its own
// uid, because some limits (pipe memory, pending signals) are counted per uid. Within 16 bits, as
// containers often map no more.
constexpr uid_t kZygoteUid = 64999;
constexpr uid_t kFirstSnippetUid = 60000;
constexpr std::uint32_t kSnippetUids = 4000;
constexpr std::string_view kHostname = "sandbox";

struct NamespaceFlag {
  Layer layer;
  unsigned long flag;
};
constexpr unsigned long kIndispensable = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID;
constexpr std::array<NamespaceFlag, 3> kNamespaces{
    {{Layer::kNetwork, CLONE_NEWNET}, {Layer::kIpc, CLONE_NEWIPC}, {Layer::kUts, CLONE_NEWUTS}}};

// Into all namespaces or, where the host refuses some that may be missing, into the others: which
// of them it refuses is not said, so each choice is tried, the fullest first.
pid_t fork_into_namespaces(std::uint32_t required, int* pidfd, std::uint32_t* layers) {
  constexpr unsigned kChoices = 1U << kNamespaces.size();
  for (std::size_t missing = 0; missing <= kNamespaces.size(); ++missing) {
    for (unsigned without = 0; without < kChoices; ++without) {
      if (static_cast<std::size_t>(std::popcount(without)) != missing) continue;
      unsigned long flags = kIndispensable;
      *layers = 0;
      bool allowed = true;
      for (std::size_t i = 0; i < kNamespaces.size(); ++i) {
        if ((without >> i & 1U) != 0) {
          allowed = allowed && (required & bit(kNamespaces[i].layer)) == 0;
        } else {
          flags |= kNamespaces[i].flag;
          *layers |= bit(kNamespaces[i].layer);
        }
      }
      const pid_t pid = allowed ? fork_into(flags, pidfd) : -1;
      if (pid >= 0) return pid;
    }
  }
  return -1;
}

// As root, each snippet's uid and the zygote's are two others than ours. Unprivileged, only the own
// uid can be mapped: zygote and snippet share it, and only capabilities tell them apart.
SetupError map_ids(const JailPlan& plan, pid_t child, std::uint32_t uid_offset) {
  const std::string proc = "/proc/" + std::to_string(child);
  if (!plan.privileged) {
    return write_id_maps(proc, {{{kSnippetUid, ::geteuid(), ::getegid()}}});
  }
  const uid_t snippet = kFirstSnippetUid + uid_offset % kSnippetUids;
  return write_id_maps(proc, {{{0, kZygoteUid, kZygoteUid}, {kSnippetUid, snippet, snippet}}});
}

// The parent's part while the child waits: its ids, its control group, then the word to go on.
SetupError release(const JailPlan& plan, pid_t child, std::uint32_t uid_offset, int cgroup,
                   int go) {
  if (const SetupError e = map_ids(plan, child, uid_offset)) return e;
  if (cgroup >= 0) {
    const std::string pid = std::to_string(child);
    if (::write(cgroup, pid.data(), pid.size()) < 0) return failed(SetupStep::kCgroup);
  }
  if (::write(go, "g", 1) != 1) return failed(SetupStep::kCloneJail, 1);
  return {};
}

// From here on we are an unprivileged user to the host, root only in our own namespaces.
SetupError become_namespace_root(bool privileged) {
  if (privileged) {
    if (::setresgid(0, 0, 0) != 0) return failed(SetupStep::kSetIds, 1);
    if (::setresuid(0, 0, 0) != 0) return failed(SetupStep::kSetIds, 2);
  }
  // The kernel resets both when the ids change. Undumpable, our own /proc/self would be the host's
  // root's.
  if (::prctl(PR_SET_DUMPABLE, 1) != 0) return failed(SetupStep::kSetIds, 3);
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return failed(SetupStep::kParentGone, 1);
  return {};
}

SetupError only_if_required(const SetupError& error, Layer layer, std::uint32_t required,
                            std::uint32_t* layers) {
  if (!error) {
    *layers |= bit(layer);
    return {};
  }
  return (required & bit(layer)) != 0 ? error : SetupError{};
}

SetupError enter_cgroup_namespace() {
  return ::unshare(CLONE_NEWCGROUP) == 0 ? SetupError{} : failed(SetupStep::kUnshare, 1);
}

// The walls that close behind us. What snippets inherit costs them nothing.
SetupError close_walls(const JailPlan& plan, int full_proc, std::uint32_t* layers) {
  const std::uint32_t required = plan.spec.required_layers;
  const auto add = [&](const SetupError& error, Layer layer) {
    return only_if_required(error, layer, required, layers);
  };
  if (::setsid() < 0) return failed(SetupStep::kSession);
  if ((*layers & bit(Layer::kUts)) != 0 && ::sethostname(kHostname.data(), kHostname.size()) != 0) {
    return failed(SetupStep::kHostname);
  }
  // Here, not when the jail was cloned: its root is the control group that we are in by now.
  if (const SetupError e = add(enter_cgroup_namespace(), Layer::kCgroup)) return e;
  if (const SetupError e = add(enter_time_namespace(full_proc), Layer::kTime)) return e;
  if (const SetupError e = empty_bounding_set()) return e;
  if (const SetupError e = set_no_new_privileges()) return e;
  // Of the covered /proc the zygote writes to its own OOM score.
  const std::vector<std::string> writable{kTemporary, kSharedMemory,
                                          "/proc/self/fd/" + std::to_string(full_proc)};
  if (const SetupError e = add(restrict_files(writable), Layer::kLandlock)) return e;
  return add(install_seccomp_filter(plan.filter), Layer::kSeccomp);
}

SetupError settle(const JailPlan& plan, std::uint32_t* layers, JailFiles* files) {
  // Sources are opened before the uid changes (an interpreter may live in a private home), and
  // mounted after it (only a mapped uid can make files in a tmpfs of this namespace).
  std::vector<MountSource> sources;
  if (const SetupError e = open_sources(plan.spec.readonly_paths, &sources)) return e;
  if (const SetupError e = become_namespace_root(plan.privileged)) return e;
  if (const SetupError e = build_root(sources, paths_under_tmp(plan.spec.readonly_paths), files)) {
    return e;
  }
  return close_walls(plan, files->full_proc.get(), layers);
}

[[noreturn]] void give_up(int socket, const SetupError& error) {
  send_message(socket, {.kind = MessageKind::kStartFailed, .error = error});
  ::_exit(1);
}

[[noreturn]] void live_in_jail(const JailPlan& plan, int socket, int go, std::uint32_t layers,
                               const GuestHooks& hooks) {
  char word = 0;
  if (::read(go, &word, 1) != 1) ::_exit(0);  // our parent failed, and told why
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  if (::dup2(socket, kControlFd) != kControlFd) {
    give_up(socket, failed(SetupStep::kFileDescriptors, 5));
  }
  if (::syscall(kSysCloseRange, unsigned{kControlFd} + 1, ~0U, 0U) != 0) {
    give_up(kControlFd, failed(SetupStep::kFileDescriptors, 6));
  }
  hooks.after_fork_child(hooks.context);
  JailFiles files;
  if (const SetupError error = settle(plan, &layers, &files)) give_up(kControlFd, error);
  serve_snippets(plan, layers, std::move(files), hooks);
}

}  // namespace

JailPlan plan_jails(const JailSpec& spec) {
  const bool privileged = ::geteuid() == 0;
  return {.spec = spec,
          .filter = build_seccomp_filter(),
          .baseline = measure_memory_baseline(),
          .privileged = privileged,
          .processes_of_ours = privileged ? 0U : 1U};
}

SetupError clone_jail(const JailPlan& plan, std::uint32_t uid_offset, int cgroup, int socket,
                      const GuestHooks& hooks, Cloned* cloned) {
  int go[2];
  if (::pipe(go) != 0) return failed(SetupStep::kCloneJail, 0);
  UniqueFd go_read(go[0]);
  UniqueFd go_write(go[1]);
  std::uint32_t layers = 0;
  int pidfd = -1;
  const pid_t pid = fork_into_namespaces(plan.spec.required_layers, &pidfd, &layers);
  if (pid < 0) return failed(SetupStep::kUnshare);
  if (pid == 0) {
    go_write.reset();
    live_in_jail(plan, socket, go_read.get(), layers, hooks);
  }
  cloned->pid = pid;
  cloned->pidfd.reset(pidfd);
  const SetupError error = release(plan, pid, uid_offset, cgroup, go_write.get());
  if (error) {
    pidfd_signal(pidfd, SIGKILL);
    ::waitpid(pid, nullptr, 0);
  }
  return error;
}

}  // namespace thor
