// Who a user namespace's ids are outside of it.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "core/setup_error.h"

namespace thor {

struct IdMap {
  unsigned inside;  // the same number for user and group
  uid_t outside_uid;
  gid_t outside_gid;
};

// Maps users and groups for the process at `proc_dir` ("/proc/123") and forbids setgroups there,
// which the kernel asks for before an unprivileged group map. More than one needs privileges.
SetupError write_id_maps(const std::string& proc_dir, const std::vector<IdMap>& maps);

}  // namespace thor
