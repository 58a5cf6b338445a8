#include "core/tree_watch.h"

#include <dirent.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "util/kernel_text.h"

namespace thor {

std::uint64_t private_memory_bytes(pid_t pid) {
  const std::optional<std::string> text = read_text("/proc/" + std::to_string(pid) + "/status");
  if (!text) return 0;
  std::uint64_t total = 0;
  // Shared anonymous memory counts once for each who maps it: rather too much than too little.
  for (const char* field : {"\nRssAnon:", "\nRssShmem:", "\nVmPTE:"}) {
    const char* found = std::strstr(text->c_str(), field);
    if (found != nullptr) total += std::strtoull(found + std::strlen(field), nullptr, 10) * 1024;
  }
  return total;
}

std::uint64_t tree_memory_bytes(std::uint64_t baseline_per_process) {
  const std::unique_ptr<DIR, int (*)(DIR*)> proc(::opendir("/proc"), &::closedir);
  if (!proc) return 0;
  std::uint64_t total = 0;
  while (const dirent* entry = ::readdir(proc.get())) {  // NOLINT: one thread
    const long pid = std::strtol(static_cast<const char*>(entry->d_name), nullptr, 10);
    if (pid <= 1) continue;
    const std::uint64_t own = private_memory_bytes(static_cast<pid_t>(pid));
    total += own - std::min(own, baseline_per_process);
  }
  return total;
}

}  // namespace thor
