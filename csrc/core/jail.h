// The zygote's jail: made once, shared by every snippet as the read-only part of its world.
#pragma once

#include "core/setup_error.h"
#include "thor/zygote.h"

namespace thor {

// Moves this single-threaded process into user, mount, network, IPC, UTS and cgroup namespaces of
// its own, as an unprivileged user with a minimal read-only root, then forks once into a new pid
// namespace and returns in that child, its init. The process that called waits for the child and
// exits when it does. On error returns in the caller.
SetupError enter_jail(const JailSpec& spec);

}  // namespace thor
