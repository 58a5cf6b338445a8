#include "core/child_setup.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <string_view>

#include "core/capabilities.h"
#include "core/id_maps.h"
#include "core/mounts.h"
#include "core/seccomp_filter.h"
#include "util/kernel_abi.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

constexpr unsigned kInsideUid = 1000;
constexpr const char* kWorkingDirectory = "/tmp/work";
constexpr std::string_view kHostname = "sandbox";
// First to go when the host runs out of memory: never the trainer, never the zygote.
constexpr std::string_view kOomScore = "1000";

SetupError raise_oom_score() {
  const UniqueFd fd(::open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
  if (!fd || ::write(fd.get(), kOomScore.data(), kOomScore.size()) < 0) {
    return failed(SetupStep::kOomScore);
  }
  return {};
}

SetupError arrange_fds(const SnippetFds& fds, int keep) {
  // Sources are all above 2: the zygote's own 0, 1 and 2 are open.
  const std::array<int, 3> sources{fds.standard_input, fds.standard_output, fds.standard_error};
  for (int target = 0; target < 3; ++target) {
    if (::dup2(sources[static_cast<std::size_t>(target)], target) != target) {
      return failed(SetupStep::kFileDescriptors, target);
    }
  }
  if (::dup2(keep, 3) != 3) return failed(SetupStep::kFileDescriptors, 3);
  if (::syscall(kSysCloseRange, 4U, ~0U, 0U) != 0) return failed(SetupStep::kFileDescriptors, 4);
  return {};
}

}  // namespace

unsigned long snippet_namespaces() {
  return CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS |
         CLONE_NEWCGROUP;
}

SetupError prepare_init(const ChildPlan& plan, const SnippetFds& fds, int keep) {
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return failed(SetupStep::kParentGone);
  // The zygote is root of its own namespace; the snippet is an ordinary user of a nested one.
  if (const SetupError e = write_id_maps("/proc/self", {kInsideUid, 0, 0})) return e;
  if (::setsid() < 0) return failed(SetupStep::kSession);
  if (::sethostname(kHostname.data(), kHostname.size()) != 0) return failed(SetupStep::kHostname);
  if (const SetupError e = raise_oom_score()) return e;
  if (const SetupError e = mount_private(plan.shadowed)) return e;
  if (const SetupError e = arrange_fds(fds, keep)) return e;
  if (::mkdir(kWorkingDirectory, S_IRWXU) != 0) return failed(SetupStep::kWorkingDirectory, 0);
  if (::chdir(kWorkingDirectory) != 0) return failed(SetupStep::kWorkingDirectory, 1);
  return {};
}

SetupError confine_snippet(const ChildPlan& plan, const Limits& limits) {
  if (const SetupError e = apply_rlimits(limits, plan.baseline)) return e;
  if (const SetupError e = drop_capabilities()) return e;
  if (const SetupError e = set_no_new_privileges()) return e;
  return install_seccomp_filter(plan.filter);
}

}  // namespace thor
