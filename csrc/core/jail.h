// A jail: namespaces and a root of their own, made once, around a zygote that serves one snippet at
// a time.
#pragma once

#include <linux/filter.h>
#include <sys/types.h>

#include <cstdint>
#include <vector>

#include "core/rlimits.h"
#include "core/setup_error.h"
#include "thor/zygote.h"
#include "util/unique_fd.h"

namespace thor {

// What is decided once per template and used for each jail.
struct JailPlan {
  JailSpec spec;
  std::vector<sock_filter> filter;
  MemoryBaseline baseline;
  bool privileged = false;              // started as root: ids of our choice can be mapped
  std::uint32_t processes_of_ours = 0;  // that count towards a snippet's limit: unprivileged, the
                                        // zygote has its uid
};
JailPlan plan_jails(const JailSpec& spec);

struct Cloned {
  pid_t pid = -1;
  UniqueFd pidfd;
};

// Forks this single-threaded process into a new jail. The child serves snippets on `socket` and
// does not return; what fails in it is told there. `cgroup` is an open cgroup.procs or -1. On error
// here, nothing is left.
SetupError clone_jail(const JailPlan& plan, std::uint32_t uid_offset, int cgroup, int socket,
                      const GuestHooks& hooks, Cloned* cloned);

}  // namespace thor
