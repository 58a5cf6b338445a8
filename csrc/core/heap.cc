#include "core/heap.h"

#include <sys/mman.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

#include "util/kernel_abi.h"

namespace thor {

std::size_t collapse_heap() {
  constexpr std::uint64_t kHuge = std::uint64_t{2} << 20;
  std::size_t collapsed = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    std::uint64_t inode = 1;
    char mode[5] = {};
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %*x %*s %" SCNu64, &begin, &end,
                    static_cast<char*>(mode), &inode) != 4) {
      continue;
    }
    const std::string permissions(static_cast<const char*>(mode));
    if (permissions != "rw-p" || inode != 0 || line.find("[stack]") != std::string::npos) continue;
    for (std::uint64_t at = (begin + kHuge - 1) / kHuge * kHuge; at + kHuge <= end; at += kHuge) {
      // Refused for a range that is mostly untouched; nothing is lost then.
      // NOLINTNEXTLINE(performance-no-int-to-ptr): addresses read from /proc
      if (::madvise(reinterpret_cast<void*>(at), kHuge, kMadvCollapse) == 0) collapsed += kHuge;
    }
  }
  return collapsed;
}

}  // namespace thor
