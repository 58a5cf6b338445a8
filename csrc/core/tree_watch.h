// The memory of all processes of a jail, where no control group bounds it.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace thor {

// Private memory of every process of this pid namespace but its pid 1, above what each of them
// shares with the zygote they were forked from. Read from /proc.
std::uint64_t tree_memory_bytes(std::uint64_t baseline_per_process);

// Resident memory of one process that is not a file's, and its page tables; 0 once it is gone.
std::uint64_t private_memory_bytes(pid_t pid);

}  // namespace thor
