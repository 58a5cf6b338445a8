// Steps of set-up that fail for real: a system call of the template and its jails is refused, or
// what they need is not there. Whoever starts a sandbox or runs a snippet is told step, index and
// errno.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "core/id_maps.h"
#include "core/jail.h"
#include "core/mounts.h"
#include "core/protocol.h"
#include "stub_sandbox.h"
#include "util/kernel_abi.h"

namespace thor {
namespace {

struct Argument {
  unsigned position;
  unsigned long value;
  unsigned mask = ~0U;
};

// A system call that fails with `error` if its arguments are these (stub_guest.cc).
std::string refuse(long number, int error, const std::vector<Argument>& arguments = {}) {
  std::ostringstream rule;
  rule << number << ' ' << error;
  for (const Argument& one : arguments) {
    rule << ' ' << one.position << ' ' << one.mask << ' ' << static_cast<unsigned>(one.value);
  }
  rule << ';';
  return rule.str();
}

// What a user sees of a sandbox whose template has this environment: why it did not start, or what
// became of a snippet. A child that cannot be set up shows in the one or the other.
std::string complaint(const std::vector<std::string>& env, const Request& request) {
  OrchestratorConfig config = stub_config(1);
  config.env = env;
  try {
    Orchestrator orchestrator(config);
    const Result result = run_one(orchestrator, request);
    EXPECT_EQ(result.status, Status::kInfra);
    return result.error;
  } catch (const StartError& e) {
    return e.what();
  }
}

struct Case {
  const char* name;
  std::string refused;
  SetupError expected;
  bool as_root_only = false;
};

// Where an architecture has only the newer call, C's function makes that one.
#ifdef SYS_dup2
std::string no_dup2(unsigned target) { return refuse(SYS_dup2, EBADF, {{1, target}}); }
std::string no_mkdir() { return refuse(SYS_mkdir, ENOSPC, {{1, S_IRWXU}}); }
std::string no_rmdir() { return refuse(SYS_rmdir, EBUSY); }
std::string no_chown() { return refuse(SYS_chown, EPERM); }
std::string no_pipe() { return refuse(SYS_pipe, EMFILE) + refuse(SYS_pipe2, EMFILE, {{1, 0}}); }
#else
std::string no_dup2(unsigned target) { return refuse(SYS_dup3, EBADF, {{1, target}}); }
std::string no_mkdir() { return refuse(SYS_mkdirat, ENOSPC, {{2, S_IRWXU}}); }
std::string no_rmdir() { return refuse(SYS_unlinkat, EBUSY); }
std::string no_chown() { return refuse(SYS_fchownat, EPERM); }
std::string no_pipe() { return refuse(SYS_pipe2, EMFILE, {{1, 0}}); }
#endif

std::string no_mount(unsigned long flags) { return refuse(SYS_mount, EPERM, {{3, flags}}); }
std::string no_prctl(int option, unsigned long value) {
  return refuse(SYS_prctl, EPERM, {{0, static_cast<unsigned>(option)}, {1, value}});
}

std::vector<Case> cases() {
  using S = SetupStep;
  constexpr unsigned long kPlainMount = MS_NOSUID | MS_NODEV;
  return {
      // the template
      {"ParentSignal", refuse(SYS_signalfd4, EMFILE), {S::kParentGone, EMFILE, 2}},
      {"ParentDeath", no_prctl(PR_SET_PDEATHSIG, SIGTERM), {S::kParentGone, EPERM, 3}},
      {"WordToGoOn", no_pipe(), {S::kCloneJail, EMFILE, 0}},
      {"GoOn", refuse(SYS_write, EIO, {{2, 1}}), {S::kCloneJail, EIO, 1}},
      {"Namespaces", refuse(kSysClone3, ENOSPC), {S::kUnshare, ENOSPC, 0}},
      {"Setgroups", refuse(SYS_write, EPERM, {{2, 4}}), {S::kIdMaps, EPERM, 0}},
      // the zygote
      {"ControlSocket", no_dup2(kControlFd), {S::kFileDescriptors, EBADF, 5}},
      {"CloseTheRest", refuse(kSysCloseRange, EINVAL, {{0, 4}}), {S::kFileDescriptors, EINVAL, 6}},
      {"SetGroup", refuse(SYS_setresgid, EPERM, {{0, 0}}), {S::kSetIds, EPERM, 1}, true},
      {"SetUser", refuse(SYS_setresuid, EPERM, {{0, 0}}), {S::kSetIds, EPERM, 2}, true},
      {"Dumpable", no_prctl(PR_SET_DUMPABLE, 1), {S::kSetIds, EPERM, 3}},
      {"TemplateDeath", no_prctl(PR_SET_PDEATHSIG, SIGKILL), {S::kParentGone, EPERM, 1}},
      {"PrivateMounts", no_mount(MS_REC | MS_PRIVATE), {S::kRootTmpfs, EPERM, 0}},
      {"Root", no_mount(kPlainMount), {S::kRootTmpfs, EPERM, 1}},
      {"Bind", no_mount(MS_BIND | MS_REC), {S::kBind, EPERM, 0}},
      {"BindAttributes",
       refuse(kSysMountSetattr, EINVAL, {{2, AT_RECURSIVE}}),
       {S::kBind, EINVAL, 0}},
      {"Proc", no_mount(kPlainMount | MS_NOEXEC), {S::kProc, EPERM, 0}},
      {"OldRoot", no_mkdir(), {S::kPivotRoot, ENOSPC, 0}},
      {"PivotRoot", refuse(SYS_pivot_root, EINVAL), {S::kPivotRoot, EINVAL, 1}},
      {"ToTheRoot", refuse(SYS_chdir, EACCES), {S::kPivotRoot, EACCES, 2}},
      {"Unmount", refuse(SYS_umount2, EBUSY), {S::kPivotRoot, EBUSY, 3}},
      {"RemoveOldRoot", no_rmdir(), {S::kPivotRoot, EBUSY, 4}},
      {"ReadOnlyRoot", refuse(kSysMountSetattr, EPERM, {{2, 0}}), {S::kReadOnlyRoot, EPERM, 0}},
      {"Temporary", no_mount(kPlainMount | MS_NOATIME), {S::kWorkTmpfs, EPERM, 0}},
      {"SharedMemory", no_mount(kPlainMount | MS_NOATIME | MS_NOEXEC), {S::kWorkTmpfs, EPERM, 1}},
      {"OwnerOfWork", no_chown(), {S::kWorkingDirectory, EPERM, 0}},
      {"DirectoryTimes", refuse(SYS_utimensat, EACCES), {S::kPristine, EACCES, 0}},
      {"Sockets", refuse(SYS_openat, EMFILE, {{2, O_RDONLY | O_CLOEXEC}}), {S::kProc, EMFILE, 3}},
      {"Session", refuse(SYS_setsid, EPERM), {S::kSession, EPERM, 0}},
      {"Hostname", refuse(SYS_sethostname, EPERM), {S::kHostname, EPERM, 0}},
      {"CgroupNamespace",
       refuse(SYS_unshare, ENOSPC, {{0, CLONE_NEWCGROUP}}),
       {S::kUnshare, ENOSPC, 1}},
      {"TimeNamespace",
       refuse(SYS_unshare, EINVAL, {{0, static_cast<unsigned long>(kCloneNewTime)}}),
       {S::kTimeNamespace, EINVAL, 0}},
      {"TimeOffsets",  // opened in a directory that is held, unlike all else that is written
       refuse(SYS_openat, EACCES, {{0, 0, 1U << 31}, {2, O_WRONLY | O_CLOEXEC}}),
       {S::kTimeNamespace, EACCES, 1}},
      {"BoundingSet",
       refuse(SYS_prctl, EPERM, {{0, PR_CAPBSET_DROP}}),
       {S::kCapabilities, EPERM, 0}},
      {"NoNewPrivileges",
       refuse(SYS_prctl, EINVAL, {{0, PR_SET_NO_NEW_PRIVS}}),
       {S::kNoNewPrivileges, EINVAL, 0}},
      {"NoLandlock", refuse(kSysLandlockCreateRuleset, ENOSYS), {S::kLandlock, EOPNOTSUPP, 0}},
      {"LandlockRuleset",
       refuse(kSysLandlockCreateRuleset, EMFILE, {{2, 0}}),
       {S::kLandlock, EMFILE, 1}},
      {"LandlockRule", refuse(kSysLandlockAddRule, ENOMEM), {S::kLandlock, ENOMEM, 2}},
      {"LandlockRestrict", refuse(kSysLandlockRestrictSelf, E2BIG), {S::kLandlock, E2BIG, 3}},
      {"Seccomp",
       refuse(SYS_seccomp, ENOMEM, {{0, SECCOMP_SET_MODE_FILTER}}),
       {S::kSeccomp, ENOMEM, 0}},
      {"SharedPages",
       refuse(SYS_mmap, ENOMEM, {{3, MAP_SHARED | MAP_ANONYMOUS}}),
       {S::kSharedPages, ENOMEM, 0}},
      {"OwnOomScore", refuse(SYS_pread64, EIO, {{2, 16}}), {S::kOomScore, EIO, 0}},
      {"OomScore", refuse(SYS_pwrite64, EACCES, {{2, 4}}), {S::kOomScore, EACCES, 1}},
      {"Seed", refuse(SYS_getrandom, EAGAIN), {S::kSeed, EAGAIN, 0}},
      {"OutputPipes", refuse(SYS_pipe2, ENFILE, {{1, O_CLOEXEC}}), {S::kPipes, ENFILE, 0}},
      {"Fork",
       refuse(SYS_clone, EAGAIN, {{0, CLONE_CHILD_CLEARTID, CLONE_CHILD_CLEARTID}}),
       {S::kForkSnippet, EAGAIN, 0}},
      // the snippet's process
      {"SnippetGroup", refuse(SYS_setresgid, EPERM, {{0, kSnippetUid}}), {S::kSetIds, EPERM, 5}},
      {"SnippetUser", refuse(SYS_setresuid, EAGAIN, {{0, kSnippetUid}}), {S::kSetIds, EAGAIN, 5}},
      {"Capabilities", refuse(SYS_capset, EPERM), {S::kCapabilities, EPERM, 1}},
      {"Payload", refuse(SYS_read, EIO, {{2, 1 << 16}}), {S::kPayload, EIO, 0}},
      {"StandardInput", no_dup2(0), {S::kFileDescriptors, EBADF, 0}},
      {"StandardOutput", no_dup2(1), {S::kFileDescriptors, EBADF, 1}},
      {"StandardError", no_dup2(2), {S::kFileDescriptors, EBADF, 2}},
      {"CloseAll", refuse(kSysCloseRange, EINVAL, {{0, 3}}), {S::kFileDescriptors, EINVAL, 4}},
  };
}

class SetupSteps : public testing::TestWithParam<Case> {};

TEST_P(SetupSteps, StepErrnoAndIndexAreTold) {
  const Case& one = GetParam();
  if (one.as_root_only && ::geteuid() != 0) GTEST_SKIP() << "only root sets ids of its choice";
  const Request long_one = command("print " + std::string(50'000, 'x'));  // travels as a file
  const std::string said = complaint({"STUB_DENY=" + one.refused}, long_one);
  EXPECT_TRUE(said.ends_with(describe(one.expected)))
      << "got '" << said << "', expected '" << describe(one.expected) << "'";
}

INSTANTIATE_TEST_SUITE_P(Refused, SetupSteps, testing::ValuesIn(cases()),
                         [](const auto& param) { return std::string(param.param.name); });

TEST(SetupStepsByHand, EveryResourceLimit) {
  int index = 0;
  for (const unsigned resource :
       {RLIMIT_CPU, RLIMIT_DATA, RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_STACK, RLIMIT_NOFILE, RLIMIT_NPROC,
        RLIMIT_CORE, RLIMIT_MEMLOCK, RLIMIT_MSGQUEUE}) {
    const std::string rule = refuse(SYS_prlimit64, EPERM, {{1, resource}});
    EXPECT_EQ(complaint({"STUB_DENY=" + rule}, command("print x")),
              describe({SetupStep::kRlimits, EPERM, index}));
    ++index;
  }
}

TEST(SetupStepsByHand, Devices) {
  const std::string rule = refuse(SYS_openat, ENXIO, {{2, O_PATH | O_NOFOLLOW | O_CLOEXEC}});
  EXPECT_EQ(complaint({"STUB_READONLY=none", "STUB_DENY=" + rule}, command("print x")),
            "a jail could not be made: " + describe({SetupStep::kDevice, ENXIO, 0}));
}

// The index is that of the path, not of what is mounted: /usr/lib comes with /usr.
TEST(SetupStepsByHand, PathsThatAreNotThere) {
  std::vector<MountSource> sources;
  const SetupError none = open_sources({"/usr", "/usr/lib", "/nonexistent"}, &sources);
  EXPECT_EQ(describe(none), describe({SetupStep::kBind, ENOENT, 2}));
}

TEST(SetupStepsByHand, IdMaps) {
  namespace fs = std::filesystem;
  const fs::path directory = fs::path(testing::TempDir()) / ("maps" + std::to_string(::getpid()));
  fs::create_directories(directory);
  int index = 0;
  for (const char* file : {"setgroups", "uid_map", "gid_map"}) {
    EXPECT_EQ(describe(write_id_maps(directory, {{0, 1, 2}})),
              describe({SetupStep::kIdMaps, ENOENT, index++}));
    std::ofstream(directory / file).flush();
  }
  EXPECT_FALSE(write_id_maps(directory, {{0, 1, 2}}));
  fs::remove_all(directory);
}

// Nothing is left of a jail that cannot join its group.
TEST(SetupStepsByHand, ControlGroup) {
  const UniqueFd full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()), 0);
  const UniqueFd ours(ends[0]);
  const UniqueFd theirs(ends[1]);
  Cloned cloned;
  const SetupError error =
      clone_jail(plan_jails({}), 0, full.get(), theirs.get(), GuestHooks{}, &cloned);
  EXPECT_EQ(describe(error), describe({SetupStep::kCgroup, ENOSPC, 0}));
  EXPECT_EQ(::kill(cloned.pid, 0), -1);
  EXPECT_EQ(errno, ESRCH);
}

}  // namespace
}  // namespace thor
