#include "core/jail.h"

#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <vector>

#include "core/id_maps.h"
#include "core/mounts.h"
#include "util/kernel_abi.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

constexpr int kNamespaces = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC |
                            CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWPID;

// As root, another uid than our own is mapped, which only a process outside can write: a helper
// forked before the unshare does it. Unprivileged, only the own uid can be mapped, from inside.
SetupError unshare_as(unsigned host_uid) {
  const bool privileged = ::geteuid() == 0;
  if (!privileged) {
    const IdMap own{0, ::geteuid(), ::getegid()};
    if (::unshare(kNamespaces) != 0) return failed(SetupStep::kUnshare);
    return write_id_maps("/proc/self", own);
  }
  if (::setgroups(0, nullptr) != 0) return failed(SetupStep::kSetIds, 0);
  int to_helper[2];
  if (::pipe(to_helper) != 0) return failed(SetupStep::kIdMaps, 10);
  const pid_t self = ::getpid();
  const pid_t helper = ::fork();
  if (helper < 0) return failed(SetupStep::kIdMaps, 11);
  UniqueFd read_end(to_helper[0]);
  UniqueFd write_end(to_helper[1]);
  if (helper == 0) {
    char go = 0;
    write_end.reset();
    if (::read(read_end.get(), &go, 1) != 1) ::_exit(0);  // the parent could not unshare
    const std::string proc = "/proc/" + std::to_string(self);
    ::_exit(write_id_maps(proc, {0, host_uid, host_uid}).error_number);
  }
  read_end.reset();
  const bool unshared = ::unshare(kNamespaces) == 0;
  const SetupError unshare_error = failed(SetupStep::kUnshare);
  const bool told = unshared && ::write(write_end.get(), "g", 1) == 1;
  write_end.reset();
  int status = 0;
  if (::waitpid(helper, &status, 0) != helper) return failed(SetupStep::kIdMaps, 12);
  if (!told) return unshare_error;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    return {SetupStep::kIdMaps, WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD, 13};
  }
  return {};
}

// unshare(CLONE_NEWPID) moves only children: the first one is the namespace's init. `owner` is the
// process that started us: a fork of it may hold our socket open, so its death must tell us too.
SetupError fork_into_pid_namespace(pid_t owner) {
  const pid_t child = ::fork();
  if (child < 0) return failed(SetupStep::kForkZygote);
  if (child == 0) return {};
  ::syscall(kSysCloseRange, 0U, ~0U, 0U);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != owner) ::_exit(0);  // it died before the line above
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  ::_exit(0);
}

// From here on we are `host_uid` to the host, root only in our own namespaces.
SetupError become_mapped_root() {
  if (::setresgid(0, 0, 0) != 0) return failed(SetupStep::kSetIds, 1);
  if (::setresuid(0, 0, 0) != 0) return failed(SetupStep::kSetIds, 2);
  // The kernel resets both on a change of uid. Without dumpable, /proc/self/uid_map of our
  // children would belong to the host's root.
  if (::prctl(PR_SET_DUMPABLE, 1) != 0) return failed(SetupStep::kSetIds, 3);
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return failed(SetupStep::kParentGone, 1);
  return {};
}

}  // namespace

SetupError enter_jail(const JailSpec& spec) {
  const pid_t owner = ::getppid();
  if (const SetupError e = unshare_as(spec.host_uid)) return e;
  if (const SetupError e = fork_into_pid_namespace(owner)) return e;
  // Sources are opened before the uid changes (an interpreter may live in a private home), and
  // mounted after it (only a mapped uid can make files in a tmpfs of this namespace).
  std::vector<MountSource> sources;
  if (const SetupError e = open_sources(spec.readonly_paths, &sources)) return e;
  if (const SetupError e = become_mapped_root()) return e;
  return build_root(sources);
}

}  // namespace thor
