// Process handles that cannot be confused by pid reuse.
#pragma once

#include <sys/types.h>

namespace thor {

// Signals the process behind `pidfd`; one that is gone already is no error.
void pidfd_signal(int pidfd, int signal);

// fork() into the namespaces of `clone_flags`, with a pidfd for the parent.
// Returns the pid (0 in the child, -1 with errno on failure).
pid_t fork_into(unsigned long clone_flags, int* pidfd);

}  // namespace thor
