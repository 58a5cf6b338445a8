#include "core/heap.h"

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "util/kernel_abi.h"

namespace thor {
namespace {

constexpr std::uint64_t kHuge = std::uint64_t{2} << 20;
// Of what malloc takes from its heap, not from a mapping of its own.
constexpr std::size_t kLargestChunk = std::size_t{120} << 10;
constexpr std::size_t kSmallestChunk = 24;
constexpr std::size_t kChunkStep = 16;

struct Mapping {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint64_t offset = 0;  // in the file
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
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %*s %" SCNu64, &m.begin,
                    &m.end, static_cast<char*>(mode), &m.offset, &m.inode) != 5) {
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

}  // namespace

void* new_arena(std::size_t size) {
  static char* left = nullptr;
  static std::size_t left_bytes = 0;
  if (size > kHuge) return nullptr;
  if (left_bytes < size) {
    left = static_cast<char*>(huge_page());
    left_bytes = left == nullptr ? 0 : kHuge;
  }
  if (left == nullptr) return nullptr;
  left_bytes -= size;
  return std::exchange(left, left + size);
}

std::size_t fill_free_chunks() {
  ::mallopt(M_MXFAST, 0);  // small chunks are joined when they are freed, not by a later request
  ::malloc_trim(0);        // leaves less than two pages at the end
  const char* const rest =
      static_cast<const char*>(::sbrk(0)) - std::ptrdiff_t{2} * ::getpagesize();
  std::size_t taken = 0;
  for (std::size_t size = kLargestChunk; size >= kSmallestChunk; size -= kChunkStep) {
    for (;;) {
      void* chunk = ::malloc(size);
      if (chunk == nullptr || static_cast<const char*>(chunk) >= rest) {
        ::free(chunk);
        break;
      }
      taken += size;
    }
  }
  return taken;
}

std::size_t collapse_heap() {
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

void join_file_mappings() {
  Mapping run;
  const auto join = [&run] {
    if (run.end > run.begin) {
      ::mprotect(pointer(run.begin), run.end - run.begin, PROT_READ | PROT_EXEC);
    }
  };
  for (const Mapping& m : mappings()) {
    const bool constant = m.inode != 0 && (m.mode == "r--p" || m.mode == "r-xp");
    const bool goes_on = constant && m.inode == run.inode && m.begin == run.end &&
                         m.offset == run.offset + (run.end - run.begin);
    if (goes_on) {
      run.end = m.end;
    } else {
      join();
      run = constant ? m : Mapping{};
    }
  }
  join();
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
