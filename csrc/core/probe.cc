#include "thor/probe.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <utility>

#include "core/capabilities.h"
#include "core/cgroup.h"
#include "core/id_maps.h"
#include "core/landlock.h"
#include "core/seccomp_filter.h"
#include "util/kernel_abi.h"
#include "util/kernel_text.h"
#include "util/pidfd.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

// Who a jail is on the host when we are root; any uid would do that owns nothing.
constexpr unsigned kJailUid = 64999;

struct Finding {
  bool granted = false;
  std::string detail;
};

Finding granted(std::string detail = {}) { return {true, std::move(detail)}; }

// With errno: call it right after what failed.
Finding refused(const std::string& what) {
  const int error = errno;
  return {false, what + ": " + std::strerror(error) + " (errno " + std::to_string(error) + ")"};
}

Finding refused(const SetupError& error) { return {false, describe(error)}; }

using Attempt = std::function<Finding()>;

std::string how_it_ended(int status) {
  if (WIFSIGNALED(status)) return std::string("killed by ") + ::strsignal(WTERMSIG(status));
  return "exited with " + std::to_string(WEXITSTATUS(status));
}

// A child to itself for each attempt: none of them can be undone.
Finding in_child(const Attempt& attempt) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return refused("pipe2");
  const UniqueFd read_end(ends[0]);
  UniqueFd write_end(ends[1]);
  const pid_t child = ::fork();
  if (child < 0) return refused("fork");
  if (child == 0) {
    const Finding finding = attempt();
    const std::string text = (finding.granted ? "+" : "-") + finding.detail;
    ::_exit(::write(write_end.get(), text.data(), text.size()) < 0 ? 1 : 0);
  }
  write_end.reset();
  std::string text;
  std::array<char, 1024> chunk{};
  for (ssize_t n = 0; (n = ::read(read_end.get(), chunk.data(), chunk.size())) > 0;) {
    text.append(chunk.data(), static_cast<std::size_t>(n));
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child) return refused("waitpid");
  if (text.empty()) return {false, "the process that tried it was " + how_it_ended(status)};
  return {text.front() == '+', text.substr(1)};
}

// --- namespaces ----------------------------------------------------------------------------------

// Maps our ids once `go` has a word. From outside, and so forked before: that is what may map
// another uid than its own.
pid_t fork_mapper(const UniqueFd& go, UniqueFd& our_end, unsigned uid, unsigned gid) {
  const std::string target = "/proc/" + std::to_string(::getpid());
  const pid_t mapper = ::fork();
  if (mapper != 0) return mapper;
  our_end.reset();  // or it would wait for itself
  char word = 0;
  if (::read(go.get(), &word, 1) != 1) ::_exit(0);
  const SetupError error = write_id_maps(target, {{0, uid, gid}});
  ::_exit(error ? error.error_number : 0);
}

// Root of a user namespace from here on; refused() where that fails.
std::optional<Finding> refusal_of_user_namespace() {
  const bool root = ::geteuid() == 0;
  const unsigned uid = root ? kJailUid : ::geteuid();
  const unsigned gid = root ? kJailUid : ::getegid();
  if (root && ::setgroups(0, nullptr) != 0) return refused("setgroups");
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return refused("pipe2");
  const UniqueFd go(ends[0]);
  UniqueFd our_end(ends[1]);
  const pid_t mapper = fork_mapper(go, our_end, uid, gid);
  if (mapper < 0) return refused("fork");
  std::optional<Finding> failure;
  if (::unshare(CLONE_NEWUSER) != 0) {
    failure = refused("unshare(CLONE_NEWUSER)");
  } else if (::write(our_end.get(), "g", 1) != 1) {
    failure = refused("write");
  }
  our_end.reset();
  int status = 0;
  if (::waitpid(mapper, &status, 0) != mapper) return refused("waitpid");
  if (failure) return failure;
  errno = WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD;
  if (errno != 0) return refused("mapping uid " + std::to_string(uid));
  if (::setresgid(0, 0, 0) != 0 || ::setresuid(0, 0, 0) != 0) return refused("setresuid");
  return std::nullopt;
}

Finding user_namespace() {
  const unsigned uid = ::geteuid() == 0 ? kJailUid : ::geteuid();
  if (const auto failure = refusal_of_user_namespace()) return *failure;
  return granted("as uid " + std::to_string(uid) + " of the host");
}

Finding own_namespace(int flag, const char* name) {
  if (const auto failure = refusal_of_user_namespace()) return *failure;
  return ::unshare(flag) == 0 ? granted() : refused("unshare(" + std::string(name) + ")");
}

// As pid 1 of a fresh pid namespace, with a mount namespace of its own.
Finding as_init(const Attempt& attempt) {
  if (const auto failure = refusal_of_user_namespace()) return *failure;
  if (::unshare(CLONE_NEWPID | CLONE_NEWNS) != 0) {
    return refused("unshare(CLONE_NEWPID | CLONE_NEWNS)");
  }
  return in_child([&attempt] {
    if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) {
      return refused("making mounts private");
    }
    return attempt();
  });
}

std::optional<Finding> refusal_of_proc() {
  constexpr unsigned long kFlags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  if (::mount("proc", "/proc", "proc", kFlags, nullptr) != 0) return refused("mounting proc");
  return std::nullopt;
}

Finding private_proc() {
  return as_init([] {
    if (const auto failure = refusal_of_proc()) return *failure;
    std::array<char, 16> pid{};
    if (::readlink("/proc/self", pid.data(), pid.size() - 1) < 0) return refused("/proc/self");
    const std::string_view seen(pid.data());
    return seen == "1" ? granted()
                       : Finding{false, "/proc/self is " + std::string(seen) + ", expected 1"};
  });
}

// Lets the next pid be chosen, so that every snippet is pid 2.
Finding checkpoint_restore() {
  return as_init([] {
    constexpr int kChosen = 42;
    constexpr const char* kLastPid = "/proc/sys/kernel/ns_last_pid";
    if (const auto failure = refusal_of_proc()) return *failure;
    if (!write_text(kLastPid, std::to_string(kChosen - 1))) return refused(kLastPid);
    const pid_t child = ::fork();
    if (child == 0) ::_exit(0);
    ::waitpid(child, nullptr, 0);
    if (child == kChosen) return granted();
    return Finding{false, "the next pid was " + std::to_string(child) + ", expected " +
                              std::to_string(kChosen)};
  });
}

bool make_read_only(const char* path, unsigned flags) {
  MountAttr attr;
  attr.attr_set = kMountAttrReadOnly | kMountAttrNoSuid;
  return ::syscall(kSysMountSetattr, AT_FDCWD, path, flags, &attr, sizeof(attr)) == 0;
}

Finding private_root() {
  return as_init([] {
    if (::mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=755") != 0) {
      return refused("mounting tmpfs");
    }
    if (::mkdir("/tmp/usr", S_IRWXU) != 0 || ::mkdir("/tmp/old", S_IRWXU) != 0) {
      return refused("mkdir");
    }
    if (::mount("/usr", "/tmp/usr", nullptr, MS_BIND | MS_REC, nullptr) != 0) {
      return refused("bind mount");
    }
    if (!make_read_only("/tmp/usr", AT_RECURSIVE)) return refused("mount_setattr");
    if (::syscall(SYS_pivot_root, "/tmp", "/tmp/old") != 0) return refused("pivot_root");
    if (::chdir("/") != 0 || ::umount2("/old", MNT_DETACH) != 0) return refused("umount2");
    if (!make_read_only("/", 0)) return refused("mount_setattr");
    if (::mkdir("/new", S_IRWXU) == 0) return Finding{false, "a read-only root could be written"};
    return granted();
  });
}

// --- privileges and system calls -----------------------------------------------------------------

Finding no_new_privileges() {
  if (const SetupError e = set_no_new_privileges()) return refused(e);
  const int set = ::prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
  return set == 1 ? granted() : Finding{false, "reads " + std::to_string(set) + ", expected 1"};
}

// A filter of our own must load, and be obeyed: EDOM is what no kernel answers to getppid.
Finding seccomp_filter() {
  if (const SetupError e = set_no_new_privileges()) return refused(e);
  const SetupError error = install_seccomp_filter({
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EDOM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  });
  if (error) return refused(error);
  const bool obeyed = ::syscall(SYS_getppid) == -1 && errno == EDOM;
  return obeyed ? granted() : Finding{false, "a loaded filter had no effect"};
}

Finding pidfd() {
  const UniqueFd self(static_cast<int>(::syscall(kSysPidfdOpen, ::getpid(), 0U)));
  if (!self) return refused("pidfd_open");
  const bool sent = ::syscall(kSysPidfdSendSignal, self.get(), 0, nullptr, 0U) == 0;
  return sent ? granted() : refused("pidfd_send_signal");
}

Finding close_range() {
  const int fd = ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
  if (fd < 0) return refused("fcntl");
  const auto number = static_cast<unsigned>(fd);
  return ::syscall(kSysCloseRange, number, number, 0U) == 0 ? granted() : refused("close_range");
}

Finding clone3() {
  int fd = -1;
  const pid_t child = fork_into(0, &fd);
  if (child < 0) return refused("clone3");
  if (child == 0) ::_exit(0);
  const UniqueFd closing(fd);
  return ::waitpid(child, nullptr, 0) == child ? granted() : refused("waitpid");
}

Finding landlock() {
  const int abi = landlock_abi();
  if (abi == 0) {
    errno = EOPNOTSUPP;
    return refused("landlock_create_ruleset");
  }
  if (const SetupError e = set_no_new_privileges()) return refused(e);
  if (const SetupError e = restrict_files({})) return refused(e);
  const UniqueFd file(::open("/tmp", O_TMPFILE | O_WRONLY | O_CLOEXEC, S_IRWXU));
  if (file) return {false, "a file could be made where none may be"};
  return granted("ABI " + std::to_string(abi));
}

// --- resources -----------------------------------------------------------------------------------

Finding memory_cgroup() {
  const CgroupPool pool;
  if (pool.version() == CgroupVersion::kNone) return {false, pool.reason()};
  Cgroup group;
  if (const CgroupError e = pool.create("probe", &group)) return {false, describe(e)};
  const pid_t member = ::fork();
  if (member < 0) return refused("fork");
  if (member == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) ::pause();
  }
  const CgroupError attached = group.attach(member);
  const CgroupError emptied = group.kill_all();
  ::kill(member, SIGKILL);  // where it is no member
  ::waitpid(member, nullptr, 0);
  if (attached) return {false, describe(attached)};
  if (emptied) return {false, describe(emptied)};
  const std::filesystem::path parent = std::filesystem::path(pool.path()).parent_path();
  return granted((pool.version() == CgroupVersion::kV1 ? "v1 at " : "v2 at ") + parent.string());
}

Finding huge_pages() {
  constexpr const char* kSize = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size";
  const std::optional<std::string> text = read_text(kSize);
  const std::optional<std::uint64_t> size = text ? to_number(*text) : std::nullopt;
  if (!size) return refused(kSize);
  void* memory =
      ::mmap(nullptr, 2 * *size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return refused("mmap");
  const auto start = reinterpret_cast<std::uintptr_t>(memory);
  auto* page = static_cast<char*>(memory) + (*size - start % *size);
  page[0] = 1;  // there must be something to collapse
  // EAGAIN and EBUSY are passing states of a page, not an answer.
  for (int attempt = 0; attempt < 10; ++attempt) {
    if (::madvise(page, *size, kMadvCollapse) == 0) return granted();
    if (errno != EAGAIN && errno != EBUSY) break;
  }
  return refused("madvise(MADV_COLLAPSE)");
}

Finding cpus() {
  std::array<cpu_set_t, 8> set{};  // a kernel can have 8192 CPUs, one cpu_set_t holds 1024
  if (::sched_getaffinity(0, sizeof(set), set.data()) != 0) return refused("sched_getaffinity");
  return granted(std::to_string(CPU_COUNT_S(sizeof(set), set.data())));
}

int count_threads() {
  std::error_code error;
  const std::filesystem::directory_iterator tasks("/proc/self/task", error);
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

}  // namespace

std::vector<ProbedLayer> probe_host() {
  if (const int threads = count_threads(); threads != 1) {
    throw std::runtime_error("probe_host was called in a process with " + std::to_string(threads) +
                             " threads, expected 1");
  }
  struct Trial {
    const char* name;
    Attempt attempt;
  };
  const auto unshared = [](int flag, const char* name) {
    return [flag, name] { return own_namespace(flag, name); };
  };
  const std::vector<Trial> trials{
      {"user_namespace", user_namespace},
      {"pid_namespace", unshared(CLONE_NEWPID, "CLONE_NEWPID")},
      {"mount_namespace", unshared(CLONE_NEWNS, "CLONE_NEWNS")},
      {"network_namespace", unshared(CLONE_NEWNET, "CLONE_NEWNET")},
      {"ipc_namespace", unshared(CLONE_NEWIPC, "CLONE_NEWIPC")},
      {"uts_namespace", unshared(CLONE_NEWUTS, "CLONE_NEWUTS")},
      {"cgroup_namespace", unshared(CLONE_NEWCGROUP, "CLONE_NEWCGROUP")},
      {"time_namespace", unshared(kCloneNewTime, "CLONE_NEWTIME")},
      {"private_proc", private_proc},
      {"private_root", private_root},
      {"seccomp_filter", seccomp_filter},
      {"no_new_privs", no_new_privileges},
      {"pidfd", pidfd},
      {"close_range", close_range},
      {"clone3", clone3},
      {"landlock", landlock},
      {"memory_cgroup", memory_cgroup},
      {"checkpoint_restore", checkpoint_restore},
      {"huge_pages", huge_pages},
      {"cpus", cpus},
  };
  std::vector<ProbedLayer> layers;
  for (const Trial& trial : trials) {
    Finding finding = in_child(trial.attempt);
    layers.push_back({trial.name, finding.granted, std::move(finding.detail)});
  }
  return layers;
}

}  // namespace thor
