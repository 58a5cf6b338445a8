// Per-process resource limits of a snippet.
#pragma once

#include <cstdint>

#include "core/setup_error.h"
#include "thor/execution.h"

namespace thor {

// What the warm interpreter already uses: limits are granted on top of it.
struct MemoryBaseline {
  std::uint64_t address_space_bytes = 0;
  std::uint64_t data_bytes = 0;
};

// Of this process, now (from /proc/self/statm). Zeros if /proc cannot be read.
MemoryBaseline measure_memory_baseline();

// `processes_of_ours` run under the same uid and count like the snippet's.
SetupError apply_rlimits(const Limits& limits, const MemoryBaseline& baseline,
                         std::uint32_t processes_of_ours);

}  // namespace thor
