#include "core/spawn.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>

#include "core/protocol.h"
#include "util/kernel_abi.h"

namespace thor {
namespace {

void check(int error, const std::string& what) {
  if (error != 0) throw std::system_error(error, std::generic_category(), what);
}

std::vector<char*> pointers(const std::vector<std::string>& strings) {
  std::vector<char*> out;
  out.reserve(strings.size() + 1);
  // posix_spawn's signature predates const; it does not write.
  for (const std::string& s : strings) out.push_back(const_cast<char*>(s.c_str()));
  out.push_back(nullptr);
  return out;
}

// posix_spawn's two parameter objects, freed together.
class SpawnPlan {
 public:
  SpawnPlan(int control, int messages) {
    check(::posix_spawn_file_actions_init(&actions_), "posix_spawn_file_actions_init");
    check(::posix_spawnattr_init(&attributes_), "posix_spawnattr_init");
    check(::posix_spawn_file_actions_addopen(&actions_, 0, "/dev/null", O_RDONLY, 0), "addopen");
    check(::posix_spawn_file_actions_adddup2(&actions_, messages, 1), "adddup2");
    check(::posix_spawn_file_actions_adddup2(&actions_, messages, 2), "adddup2");
    check(::posix_spawn_file_actions_adddup2(&actions_, control, kControlFd), "adddup2");
    sigset_t none;
    sigemptyset(&none);
    sigset_t all;
    sigfillset(&all);
    // Its own session: the terminal's Ctrl-C is for the owner, who then closes us.
    check(::posix_spawnattr_setflags(
              &attributes_, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF),
          "setflags");
    check(::posix_spawnattr_setsigmask(&attributes_, &none), "setsigmask");
    check(::posix_spawnattr_setsigdefault(&attributes_, &all), "setsigdefault");
  }
  ~SpawnPlan() {
    ::posix_spawn_file_actions_destroy(&actions_);
    ::posix_spawnattr_destroy(&attributes_);
  }
  SpawnPlan(const SpawnPlan&) = delete;
  SpawnPlan& operator=(const SpawnPlan&) = delete;

  int spawn(const std::vector<std::string>& argv, const std::vector<std::string>& env) {
    pid_t pid = -1;
    check(::posix_spawn(&pid, argv[0].c_str(), &actions_, &attributes_, pointers(argv).data(),
                        pointers(env).data()),
          "starting " + argv[0]);
    return pid;
  }

 private:
  posix_spawn_file_actions_t actions_{};
  posix_spawnattr_t attributes_{};
};

// In time for all its children: it has one thread, and makes none before it is asked to.
int keep_to(const std::vector<int>& cpus, int pid) {
  if (cpus.empty()) return 0;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) {
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  return ::sched_setaffinity(pid, sizeof set, &set) == 0 ? 0 : errno;
}

}  // namespace

Spawned spawn_template(const std::vector<std::string>& argv, const std::vector<std::string>& env,
                       const std::vector<int>& cpus) {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) {
    check(errno, "socketpair");
  }
  Spawned out;
  out.control.reset(ends[0]);
  UniqueFd theirs(ends[1]);
  if (theirs.get() <= kControlFd) {  // dup2 onto itself would keep close-on-exec
    theirs.reset(::fcntl(theirs.get(), F_DUPFD_CLOEXEC, kControlFd + 1));
  }
  if (::fcntl(out.control.get(), F_SETFL, O_NONBLOCK) != 0) check(errno, "fcntl");
  out.messages.reset(::memfd_create("thor-template-messages", MFD_CLOEXEC));
  if (!theirs || !out.messages) check(errno, "memfd_create");
  out.pid = SpawnPlan(theirs.get(), out.messages.get()).spawn(argv, env);
  out.pidfd.reset(static_cast<int>(::syscall(kSysPidfdOpen, out.pid, 0)));
  const int unopened = out.pidfd ? 0 : errno;
  const int unkept = keep_to(cpus, out.pid);
  if (unopened != 0 || unkept != 0) {
    ::kill(out.pid, SIGKILL);
    ::waitpid(out.pid, nullptr, 0);
    check(unopened, "pidfd_open");
    check(unkept, "sched_setaffinity");
  }
  return out;
}

std::string read_messages(const Spawned& spawned) {
  std::array<char, 4096> text{};
  const ssize_t n = ::pread(spawned.messages.get(), text.data(), text.size(), 0);
  return n > 0 ? std::string(text.data(), static_cast<std::size_t>(n)) : std::string();
}

}  // namespace thor
