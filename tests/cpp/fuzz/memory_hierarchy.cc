// /proc/self/mountinfo and /proc/self/cgroup as no kernel writes them. A NUL parts the two.
#include "core/memory_hierarchy.h"

#include <cstdlib>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t middle = input.find('\0');
  if (middle == std::string_view::npos) return 0;
  const thor::MemoryHierarchy found =
      thor::find_memory_hierarchy(input.substr(0, middle), input.substr(middle + 1));
  // Either a place or a reason.
  if ((found.version == thor::CgroupVersion::kNone) == found.reason.empty()) std::abort();
  return 0;
}
