// The system calls a snippet may make: an allow-list, compiled to classic BPF once per zygote.
#pragma once

#include <linux/filter.h>

#include <cstdint>
#include <vector>

#include "core/setup_error.h"

namespace thor {

// What the filter does with a call.
enum class Verdict : std::uint8_t {
  kAllow,
  kUnknown,  // ENOSYS: as an older kernel would answer, so libraries take their fallback
  kForbid,   // EPERM
  kClone,    // forbidden with any namespace flag
  kSocket,   // local and IP families only: the network namespace makes IP harmless, not vsock
  kIoctl,    // queries only: TIOCSTI would type into our terminal
  kPrctl,    // names and PDEATHSIG only
};

// The verdict on a system call of this architecture, by number.
Verdict verdict_of(std::uint32_t syscall_number);

// A decision tree over syscall numbers: about 10 instructions per call whatever the list's length,
// so that loading it (the kernel evaluates it for every number) stays cheap.
std::vector<sock_filter> build_seccomp_filter();

// Loads the filter into this process for good. Needs no_new_privs.
SetupError install_seccomp_filter(const std::vector<sock_filter>& filter);

}  // namespace thor
