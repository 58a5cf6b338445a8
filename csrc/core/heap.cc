#include "core/heap.h"

#include <malloc.h>
#include <sys/mman.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "util/kernel_abi.h"

namespace thor {
namespace {

constexpr std::uint64_t kHuge = std::uint64_t{2} << 20;

struct Mapping {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t inode = 0;
  std::string mode;
  bool stack = false;
};

std::vector<Mapping> mappings() {
  std::vector<Mapping> out;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    Mapping m;
    char mode[5] = {};
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %*x %*s %" SCNu64, &m.begin, &m.end,
                    static_cast<char*>(mode), &m.inode) != 4) {
      continue;
    }
    m.mode = static_cast<const char*>(mode);
    m.stack = line.find("[stack]") != std::string::npos;
    out.push_back(m);
  }
  return out;
}

// NOLINTNEXTLINE(performance-no-int-to-ptr): addresses read from /proc
void* pointer(std::uint64_t address) { return reinterpret_cast<void*>(address); }

std::uint64_t round_up(std::uint64_t address) { return (address + kHuge - 1) / kHuge * kHuge; }

// An aligned range for itself, of which the caller uses the first kHuge bytes.
void* huge_page() {
  void* area =
      ::mmap(nullptr, 2 * kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (area == MAP_FAILED) return nullptr;
  const auto begin = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(area));
  const std::uint64_t aligned = round_up(begin);
  if (aligned > begin) ::munmap(area, aligned - begin);
  const std::uint64_t end = begin + 2 * kHuge;
  if (end > aligned + kHuge) ::munmap(pointer(aligned + kHuge), end - aligned - kHuge);
  return pointer(aligned);
}

bool move_to_huge_page(std::uint64_t address) {
  void* copy = huge_page();
  if (copy == nullptr) return false;
  std::memcpy(copy, pointer(address), kHuge);
  const bool moved =
      ::madvise(copy, kHuge, kMadvCollapse) == 0 &&
      ::mprotect(copy, kHuge, PROT_READ | PROT_EXEC) == 0 &&
      ::mremap(copy, kHuge, kHuge, MREMAP_MAYMOVE | MREMAP_FIXED, pointer(address)) != MAP_FAILED;
  if (!moved) ::munmap(copy, kHuge);
  return moved;
}

// Joins free chunks and sorts them into their bins: work that malloc puts off until a larger
// request comes, which would be in every child, and there write to a page for each chunk.
void tidy_free_chunks() {
  ::mallopt(M_MXFAST, 0);  // nothing to join later
  ::malloc_trim(0);
  constexpr std::size_t kLarger = 100 << 10;  // than any chunk in a bin, yet from the same heap
  ::free(::malloc(kLarger));
}

}  // namespace

std::size_t collapse_heap() {
  tidy_free_chunks();
  std::size_t collapsed = 0;
  for (const Mapping& m : mappings()) {
    if (m.mode != "rw-p" || m.inode != 0 || m.stack) continue;
    for (std::uint64_t at = round_up(m.begin); at + kHuge <= m.end; at += kHuge) {
      // Refused for a range that is mostly untouched; nothing is lost then.
      if (::madvise(pointer(at), kHuge, kMadvCollapse) == 0) collapsed += kHuge;
    }
  }
  return collapsed;
}

std::size_t move_code_to_huge_pages(const void* code) {
  const auto wanted = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(code));
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t inode = 0;
  for (const Mapping& m : mappings()) {
    const bool constant = m.inode != 0 && m.mode[0] == 'r' && m.mode[1] == '-';
    if (constant && m.inode == inode && m.begin == end) {
      end = m.end;  // goes on with other rights
    } else if (end > wanted && begin <= wanted) {
      break;  // the run that has it is complete
    } else {
      begin = m.begin;
      end = constant ? m.end : m.begin;
      inode = constant ? m.inode : 0;
    }
  }
  if (wanted < begin || wanted >= end) return 0;
  std::size_t moved = 0;
  for (std::uint64_t at = round_up(begin); at + kHuge <= end; at += kHuge) {
    if (move_to_huge_page(at)) moved += kHuge;
  }
  return moved;
}

}  // namespace thor
