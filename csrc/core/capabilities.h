// Giving up privileges for good.
#pragma once

#include "core/setup_error.h"

namespace thor {

// No execve by this process or its descendants can gain a capability from now on.
SetupError empty_bounding_set();

// Empties the other capability sets of this thread.
SetupError drop_capabilities();

// execve can no longer grant anything; also what lets an unprivileged process load seccomp.
SetupError set_no_new_privileges();

}  // namespace thor
