#include "core/seccomp_filter.h"

#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstring>
#include <set>

#include "core/syscall_table.h"

namespace thor {
namespace {

#if defined(__x86_64__)
constexpr std::uint32_t kArch = AUDIT_ARCH_X86_64;
#else
constexpr std::uint32_t kArch = AUDIT_ARCH_AARCH64;
#endif
constexpr std::uint32_t kEnosys = SECCOMP_RET_ERRNO | ENOSYS;
constexpr std::uint32_t kEperm = SECCOMP_RET_ERRNO | EPERM;

// The kernel's classic BPF machine, as far as the filter uses it.
std::uint32_t evaluate(const seccomp_data& data) {
  static const std::vector<sock_filter> program = build_seccomp_filter();
  std::uint32_t accumulator = 0;
  std::size_t pc = 0;
  for (;;) {
    const sock_filter& op = program.at(pc++);
    switch (op.code) {
      case BPF_LD | BPF_W | BPF_ABS:
        std::memcpy(&accumulator, reinterpret_cast<const char*>(&data) + op.k, 4);
        break;
      case BPF_JMP | BPF_JA: pc += op.k; break;
      case BPF_JMP | BPF_JEQ | BPF_K: pc += accumulator == op.k ? op.jt : op.jf; break;
      case BPF_JMP | BPF_JGE | BPF_K: pc += accumulator >= op.k ? op.jt : op.jf; break;
      case BPF_JMP | BPF_JSET | BPF_K: pc += (accumulator & op.k) != 0 ? op.jt : op.jf; break;
      case BPF_RET | BPF_K: return op.k;
      default: ADD_FAILURE() << "unknown instruction " << op.code; return 0;
    }
  }
}

std::uint32_t call(long number, std::uint64_t a = 0, std::uint64_t b = 0) {
  seccomp_data data{};
  data.nr = static_cast<int>(number);
  data.arch = kArch;
  data.args[0] = a;
  data.args[1] = b;
  return evaluate(data);
}

TEST(SeccompFilter, DecidesEveryNumberAsTheTableSays) {
  for (std::uint32_t number = 0; number < 1'000; ++number) {
    const std::uint32_t got = call(number);
    switch (verdict_of(number)) {
      case Verdict::kAllow: EXPECT_EQ(got, SECCOMP_RET_ALLOW) << number; break;
      case Verdict::kUnknown: EXPECT_EQ(got, kEnosys) << number; break;
      case Verdict::kForbid: EXPECT_EQ(got, kEperm) << number; break;
      default: break;  // by argument: below
    }
  }
}

TEST(SeccompFilter, NoCallIsBothAllowedAndForbidden) {
  const std::set<std::uint32_t> allowed(allowed_syscalls().begin(), allowed_syscalls().end());
  EXPECT_EQ(allowed.size(), allowed_syscalls().size());
  for (const std::uint32_t number : forbidden_syscalls()) EXPECT_FALSE(allowed.contains(number));
}

TEST(SeccompFilter, ForeignAbisAreKilled) {
  seccomp_data data{};
  data.arch = AUDIT_ARCH_I386;
  data.nr = __NR_read;
  EXPECT_EQ(evaluate(data), SECCOMP_RET_KILL_PROCESS);
#if defined(__x86_64__)
  EXPECT_EQ(call(0x40000000 | __NR_read), SECCOMP_RET_KILL_PROCESS);
#endif
}

TEST(SeccompFilter, KernelSurfaceIsRefused) {
  constexpr int kIoUringSetup = 425;
  for (const int number :
       {__NR_ptrace, __NR_mount, __NR_bpf, __NR_keyctl, __NR_perf_event_open, __NR_unshare,
        __NR_setns, __NR_process_vm_readv, __NR_userfaultfd, kIoUringSetup}) {
    EXPECT_EQ(call(number), kEperm) << number;
  }
}

TEST(SeccompFilter, CloneMakesThreadsAndProcessesButNoNamespaces) {
  EXPECT_EQ(call(__NR_clone, CLONE_VM | CLONE_THREAD), SECCOMP_RET_ALLOW);
  EXPECT_EQ(call(__NR_clone, SIGCHLD), SECCOMP_RET_ALLOW);
  for (const std::uint32_t flag :
       std::initializer_list<std::uint32_t>{CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET,
                                            CLONE_NEWIPC, CLONE_NEWUTS, CLONE_NEWCGROUP}) {
    EXPECT_EQ(call(__NR_clone, flag | SIGCHLD), kEperm) << flag;
  }
  EXPECT_EQ(call(435), kEnosys);  // clone3: its flags cannot be seen
}

TEST(SeccompFilter, SocketsAreLocal) {
  EXPECT_EQ(call(__NR_socket, AF_UNIX), SECCOMP_RET_ALLOW);
  for (const std::uint32_t family : std::initializer_list<std::uint32_t>{
           AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_VSOCK, AF_ALG, AF_KEY}) {
    EXPECT_EQ(call(__NR_socket, family), SECCOMP_RET_ERRNO | EAFNOSUPPORT) << family;
  }
}

TEST(SeccompFilter, IoctlAndPrctlByRequest) {
  EXPECT_EQ(call(__NR_ioctl, 0, TCGETS), SECCOMP_RET_ALLOW);
  EXPECT_EQ(call(__NR_ioctl, 0, TIOCSTI), SECCOMP_RET_ERRNO | ENOTTY);
  EXPECT_EQ(call(__NR_prctl, PR_SET_NAME), SECCOMP_RET_ALLOW);
  EXPECT_EQ(call(__NR_prctl, PR_SET_SECUREBITS), kEperm);
  EXPECT_EQ(call(__NR_prctl, PR_SET_SECCOMP), kEperm);
}

// What the kernel does at load time: it walks the tree for every call number.
TEST(SeccompFilter, StaysShallow) { EXPECT_LT(build_seccomp_filter().size(), 600U); }

// The kernel takes 4096 instructions; a jail then does not start, and says why.
TEST(SeccompFilter, AFilterThatTheKernelRefusesIsAnError) {
  const std::vector<sock_filter> endless(BPF_MAXINSNS + 1, sock_filter{BPF_RET | BPF_K, 0, 0, 0});
  EXPECT_EQ(describe(install_seccomp_filter(endless)),
            "installing the seccomp filter [0]: Invalid argument (errno 22)");
  EXPECT_EQ(describe(install_seccomp_filter({})),
            "installing the seccomp filter [0]: Invalid argument (errno 22)");
}

}  // namespace
}  // namespace thor
