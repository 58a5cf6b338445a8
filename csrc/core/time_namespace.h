// A time namespace whose monotonic clocks begin when the jail does.
#pragma once

#include "core/setup_error.h"

namespace thor {

// For children forked from now on. `proc` is an open /proc. The host's uptime would tell one
// snippet which other ran on the same machine, and when.
SetupError enter_time_namespace(int proc);

}  // namespace thor
