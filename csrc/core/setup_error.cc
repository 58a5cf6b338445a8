#include "core/setup_error.h"

#include <cerrno>
#include <system_error>

namespace thor {
namespace {

const char* name(SetupStep step) {
  switch (step) {
    case SetupStep::kNone: return "nothing";
    case SetupStep::kSingleThread: return "checking that the template has one thread";
    case SetupStep::kParentGone: return "watching for the parent's death";
    case SetupStep::kUnshare: return "creating a jail's namespaces";
    case SetupStep::kIdMaps: return "writing the user and group maps";
    case SetupStep::kSetIds: return "dropping to an unprivileged user";
    case SetupStep::kRootTmpfs: return "mounting the jail's root";
    case SetupStep::kPivotRoot: return "changing to the jail's root";
    case SetupStep::kBind: return "bind-mounting a read-only path";
    case SetupStep::kDevice: return "providing a device";
    case SetupStep::kProc: return "mounting /proc";
    case SetupStep::kReadOnlyRoot: return "making the jail's root read-only";
    case SetupStep::kCloneJail: return "talking to a new jail";
    case SetupStep::kCgroup: return "joining a control group";
    case SetupStep::kTimeNamespace: return "creating a time namespace";
    case SetupStep::kLandlock: return "restricting files with Landlock";
    case SetupStep::kPristine: return "remembering a writable directory";
    case SetupStep::kSharedPages: return "mapping the pages shared with a snippet";
    case SetupStep::kSeed: return "drawing a seed for random numbers";
    case SetupStep::kPipes: return "making the output pipes";
    case SetupStep::kSession: return "starting a session";
    case SetupStep::kHostname: return "setting the host name";
    case SetupStep::kWorkTmpfs: return "mounting a private tmpfs";
    case SetupStep::kOomScore: return "raising the OOM score";
    case SetupStep::kFileDescriptors: return "arranging file descriptors";
    case SetupStep::kWorkingDirectory: return "entering the working directory";
    case SetupStep::kForkSnippet: return "forking the snippet";
    case SetupStep::kRlimits: return "setting a resource limit";
    case SetupStep::kCapabilities: return "dropping capabilities";
    case SetupStep::kNoNewPrivileges: return "setting no_new_privs";
    case SetupStep::kSeccomp: return "installing the seccomp filter";
    case SetupStep::kPayload: return "reading the payload";
  }
  return "an unknown step";
}

}  // namespace

SetupError failed(SetupStep step, int index) { return {step, errno, index}; }

std::string describe(const SetupError& error) {
  return std::string(name(error.step)) + " [" + std::to_string(error.index) +
         "]: " + std::generic_category().message(error.error_number) + " (errno " +
         std::to_string(error.error_number) + ")";
}

}  // namespace thor
