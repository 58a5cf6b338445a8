// Landlock: a second wall behind the mounts. A mount that was forgotten or came back read-write is
// still read-only to who is behind it.
#pragma once

#include <string>
#include <vector>

#include "core/setup_error.h"

namespace thor {

// Version of the kernel's Landlock ABI; 0 where it is not built in or switched off.
int landlock_abi();

// For good, and for every process and thread started from here on: all files can be read and
// executed, only those below `writable` and a few devices (/dev/null and its like) can be written,
// made, renamed and removed, also across directories. No TCP port can be bound or connected to
// (ABI 4), no abstract socket or signal reaches a process that is not behind this wall (ABI 6).
// What is open already stays open; mounts can no longer be changed.
//
// Needs no_new_privs, and ABI 2: before it, no file could move between two directories of /tmp.
// The error's index: 0 ABI, 1 ruleset, 2 the rule for "/", 3 restricting, 100 + i writable[i],
// 200 + i device i.
SetupError restrict_files(const std::vector<std::string>& writable);

}  // namespace thor
