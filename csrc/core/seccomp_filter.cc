#include "core/seccomp_filter.h"

#include <fcntl.h>
#include <linux/audit.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <map>
#include <span>

#include "core/syscall_table.h"
#include "util/kernel_abi.h"

namespace thor {
namespace {

#if defined(__x86_64__)
constexpr std::uint32_t kArch = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr std::uint32_t kArch = AUDIT_ARCH_AARCH64;
#endif

// The x32 ABI shares x86_64's architecture value and would bypass a list of plain numbers.
constexpr std::uint32_t kX32Bit = 0x40000000;

constexpr std::uint32_t kNamespaceFlags = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS |
                                          CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID |
                                          CLONE_NEWNET;

constexpr std::array<std::uint32_t, 1> kSocketFamilies{AF_UNIX};
// Of SOL_SOCKET, refused: buffers are memory no limit counts; cookies are numbered machine-wide.
constexpr std::array<std::uint32_t, 5> kSocketOptions{SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE,
                                                      SO_RCVBUFFORCE, 57 /* SO_COOKIE */};
constexpr std::array<std::uint32_t, 1> kSelf{0};  // "this process" where a pid is expected
// Not among them: GETLK, leases and directory notification, which tell one snippet what another
// does with a file both can read; the size of a pipe, which is memory no limit counts.
constexpr std::array<std::uint32_t, 11> kFcntls{F_DUPFD,     F_DUPFD_CLOEXEC, F_GETFD,     F_SETFD,
                                                F_GETFL,     F_SETFL,         F_SETLK,     F_SETLKW,
                                                kOfdSetLock, kOfdSetLockWait, F_GETPIPE_SZ};
constexpr std::array<std::uint32_t, 7> kIoctls{TCGETS,  TIOCGWINSZ, FIONREAD, FIONBIO,
                                               FIOCLEX, FIONCLEX,   TIOCGPGRP};
constexpr std::array<std::uint32_t, 6> kPrctls{PR_SET_NAME,      PR_GET_NAME,     PR_SET_PDEATHSIG,
                                               PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE};

using Program = std::vector<sock_filter>;

sock_filter statement(std::uint16_t code, std::uint32_t k) { return {code, 0, 0, k}; }

sock_filter jump(std::uint16_t test, std::uint32_t k, std::uint8_t if_true, std::uint8_t if_false) {
  return {static_cast<std::uint16_t>(BPF_JMP | test | BPF_K), if_true, if_false, k};
}

sock_filter load(std::size_t offset) {
  return statement(BPF_LD | BPF_W | BPF_ABS, static_cast<std::uint32_t>(offset));
}

// The low half of an argument. Little-endian: both supported architectures are.
sock_filter load_argument(std::size_t index) {
  return load(offsetof(seccomp_data, args) + index * sizeof(std::uint64_t));
}

sock_filter allow() { return statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW); }
sock_filter refuse(std::uint32_t error) {
  return statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error);
}

Program allow_only(std::size_t argument, std::span<const std::uint32_t> values,
                   std::uint32_t error) {
  Program p{load_argument(argument)};
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto to_allow = static_cast<std::uint8_t>(values.size() - i);
    p.push_back(jump(BPF_JEQ, values[i], to_allow, 0));
  }
  p.push_back(refuse(error));
  p.push_back(allow());
  return p;
}

// A file without a name leaves no trace in its directory but the count of inodes, which the next
// snippet could read. EOPNOTSUPP, as file systems say that cannot do it: callers have a fallback.
Program open_without_tmpfile(std::size_t flags_argument) {
  return {load_argument(flags_argument), jump(BPF_JSET, O_TMPFILE & ~O_DIRECTORY, 0, 1),
          refuse(EOPNOTSUPP), allow()};
}

Program socket_option() {
  Program p{load_argument(1), jump(BPF_JEQ, SOL_SOCKET, 1, 0), allow(), load_argument(2)};
  for (std::size_t i = 0; i < kSocketOptions.size(); ++i) {
    const auto to_refuse = static_cast<std::uint8_t>(kSocketOptions.size() - i);
    p.push_back(jump(BPF_JEQ, kSocketOptions[i], to_refuse, 0));
  }
  p.push_back(allow());
  p.push_back(refuse(EPERM));
  return p;
}

// setpriority(PRIO_PROCESS, 0, ...): PRIO_USER would reach all who share our uid on the host.
Program own_priority() {
  return {load_argument(0), jump(BPF_JEQ, PRIO_PROCESS, 0, 2),
          load_argument(1), jump(BPF_JEQ, 0, 1, 0),
          refuse(EPERM),    allow()};
}

Program leaf(Verdict verdict) {
  switch (verdict) {
    case Verdict::kAllow: return {allow()};
    case Verdict::kUnknown: return {refuse(ENOSYS)};
    case Verdict::kForbid: return {refuse(EPERM)};
    case Verdict::kClone:
      return {load_argument(0), jump(BPF_JSET, kNamespaceFlags, 0, 1), refuse(EPERM), allow()};
    case Verdict::kSocket: return allow_only(0, kSocketFamilies, EAFNOSUPPORT);
    case Verdict::kSocketOption: return socket_option();
    case Verdict::kOpen: return open_without_tmpfile(1);
    case Verdict::kOpenAt: return open_without_tmpfile(2);
    case Verdict::kIoctl: return allow_only(1, kIoctls, ENOTTY);
    case Verdict::kPrctl: return allow_only(0, kPrctls, EPERM);
    case Verdict::kFcntl: return allow_only(1, kFcntls, EPERM);
    case Verdict::kOwnPid: return allow_only(0, kSelf, EPERM);
    case Verdict::kOwnPriority: return own_priority();
  }
  return {refuse(ENOSYS)};
}

// From `start` up to the next interval's start, one verdict holds.
struct Interval {
  std::uint32_t start;
  Verdict verdict;
};

std::map<std::uint32_t, Verdict> verdicts() {
  std::map<std::uint32_t, Verdict> table;
  for (const std::uint32_t number : forbidden_syscalls()) table[number] = Verdict::kForbid;
  for (const std::uint32_t number : allowed_syscalls()) table[number] = Verdict::kAllow;
  // clone3 hides its flags in memory where a filter cannot see them: left unknown, so that
  // libraries fall back to clone.
  table[__NR_clone] = Verdict::kClone;
  table[__NR_socket] = Verdict::kSocket;
  table[__NR_socketpair] = Verdict::kSocket;
  table[__NR_getsockopt] = Verdict::kSocketOption;
  table[__NR_setsockopt] = Verdict::kSocketOption;
#if defined(__x86_64__)
  table[__NR_open] = Verdict::kOpen;
#endif
  table[__NR_openat] = Verdict::kOpenAt;
  table[__NR_ioctl] = Verdict::kIoctl;
  table[__NR_prctl] = Verdict::kPrctl;
  table[__NR_fcntl] = Verdict::kFcntl;
  table[__NR_prlimit64] = Verdict::kOwnPid;
  table[__NR_sched_setaffinity] = Verdict::kOwnPid;
  table[__NR_setpriority] = Verdict::kOwnPriority;
  return table;
}

std::vector<Interval> intervals() {
  const std::map<std::uint32_t, Verdict> table = verdicts();
  std::vector<Interval> out{{0, Verdict::kUnknown}};
  const auto begin_at = [&out](std::uint32_t start, Verdict verdict) {
    if (out.back().start == start) out.pop_back();
    if (out.empty() || out.back().verdict != verdict) out.push_back({start, verdict});
  };
  for (const auto& [number, verdict] : table) {
    begin_at(number, verdict);
    if (!table.contains(number + 1)) begin_at(number + 1, Verdict::kUnknown);
  }
  return out;
}

Program tree(std::span<const Interval> part) {
  if (part.size() == 1) return leaf(part.front().verdict);
  const std::size_t middle = part.size() / 2;
  const Program low = tree(part.first(middle));
  const Program high = tree(part.subspan(middle));
  Program p;
  const std::uint32_t pivot = part[middle].start;
  if (low.size() <= 255) {
    p.push_back(jump(BPF_JGE, pivot, static_cast<std::uint8_t>(low.size()), 0));
  } else {  // conditional jumps reach 255 instructions, unconditional ones any distance
    p.push_back(jump(BPF_JGE, pivot, 0, 1));
    p.push_back(statement(BPF_JMP | BPF_JA, static_cast<std::uint32_t>(low.size())));
  }
  p.insert(p.end(), low.begin(), low.end());
  p.insert(p.end(), high.begin(), high.end());
  return p;
}

}  // namespace

Verdict verdict_of(std::uint32_t syscall_number) {
  const std::map<std::uint32_t, Verdict> table = verdicts();
  const auto found = table.find(syscall_number);
  return found == table.end() ? Verdict::kUnknown : found->second;
}

std::vector<sock_filter> build_seccomp_filter() {
  const sock_filter kill = statement(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
  Program p{
      load(offsetof(seccomp_data, arch)), jump(BPF_JEQ, kArch, 1, 0),   kill,
      load(offsetof(seccomp_data, nr)),   jump(BPF_JGE, kX32Bit, 0, 1), kill,
  };
  const Program decisions = tree(intervals());
  p.insert(p.end(), decisions.begin(), decisions.end());
  return p;
}

SetupError install_seccomp_filter(const std::vector<sock_filter>& filter) {
  // The kernel does not write through the pointer; its type predates const.
  sock_fprog program{static_cast<unsigned short>(filter.size()),
                     const_cast<sock_filter*>(filter.data())};
  if (::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0) {
    return failed(SetupStep::kSeccomp);
  }
  return {};
}

}  // namespace thor
