#include "util/pidfd.h"

#include <signal.h>
#include <unistd.h>

#include <cstdint>

#include "util/kernel_abi.h"

namespace thor {

void pidfd_signal(int pidfd, int signal) {
  ::syscall(kSysPidfdSendSignal, pidfd, signal, nullptr, 0);
}

pid_t fork_into(unsigned long clone_flags, int* pidfd) {
  CloneArgs args;
  args.flags = clone_flags | kClonePidfd;
  args.pidfd = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pidfd));
  args.exit_signal = SIGCHLD;
  return static_cast<pid_t>(::syscall(kSysClone3, &args, sizeof(args)));
}

}  // namespace thor
