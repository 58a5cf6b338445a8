// Finding our own control group among the mounts of a host or a container.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace thor {

enum class CgroupVersion : std::uint8_t { kNone, kV1, kV2 };

// Where this process is in the hierarchy that has the memory controller.
struct MemoryHierarchy {
  CgroupVersion version = CgroupVersion::kNone;
  std::string mount;      // where the hierarchy is mounted
  std::string directory;  // our own group, at or below `mount`
  std::string reason;     // for kNone: why
};

// From the texts of /proc/self/mountinfo and /proc/self/cgroup.
MemoryHierarchy find_memory_hierarchy(std::string_view mountinfo, std::string_view own_groups);
MemoryHierarchy find_memory_hierarchy();

}  // namespace thor
