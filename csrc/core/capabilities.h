// Giving up privileges for good.
#pragma once

#include "core/setup_error.h"

namespace thor {

// Empties every capability set of this thread, the bounding set included.
SetupError drop_capabilities();

// execve can no longer grant anything; also what lets an unprivileged process load seccomp.
SetupError set_no_new_privileges();

}  // namespace thor
