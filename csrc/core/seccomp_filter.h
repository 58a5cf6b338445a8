// The system calls a snippet may make: an allow-list, compiled to classic BPF once per template.
// The zygote lives under the filter too, so that snippets inherit it: loading one costs 0.1 ms.
#pragma once

#include <linux/filter.h>

#include <cstdint>
#include <vector>

#include "core/setup_error.h"

namespace thor {

// What the filter does with a call.
enum class Verdict : std::uint8_t {
  kAllow,
  kUnknown,       // ENOSYS: as an older kernel would answer, so libraries take their fallback
  kForbid,        // EPERM
  kClone,         // forbidden with any namespace flag
  kSocket,        // the local family only: a jail's network namespace outlives its snippets
  kSocketOption,  // not what takes kernel memory, or counts sockets of others
  kOpen,          // not O_TMPFILE
  kOpenAt,        // likewise
  kIoctl,         // queries only: TIOCSTI would type into our terminal
  kPrctl,         // names, PDEATHSIG and DUMPABLE only
  kFcntl,         // without what reaches beyond the snippet
  kOwnPid,        // only with 0 for the pid: the zygote may have the snippet's uid
  kOwnPriority,   // likewise
};

// The verdict on a system call of this architecture, by number.
Verdict verdict_of(std::uint32_t syscall_number);

// A decision tree over syscall numbers: about 10 instructions per call whatever the list's length,
// so that loading it (the kernel evaluates it for every number) stays cheap.
std::vector<sock_filter> build_seccomp_filter();

// Loads the filter into this process for good. Needs no_new_privs.
SetupError install_seccomp_filter(const std::vector<sock_filter>& filter);

}  // namespace thor
