// What is done to a template's memory. It shows in this process's addresses and mappings; ctest
// gives each test a process of its own.
#include "core/heap.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace thor {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kOwnMalloc = false;  // the sanitizer's
#else
constexpr bool kOwnMalloc = true;
#endif

std::uint64_t address(const void* pointer) {
  return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

std::size_t file_mappings() {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find(" /") != std::string::npos) ++count;
  }
  return count;
}

TEST(Heap, ArenasShareBlocksThatCanBecomeHugePages) {
  constexpr std::size_t kArena = std::size_t{1} << 20;
  auto* first = static_cast<char*>(new_arena(kArena));
  auto* second = static_cast<char*>(new_arena(kArena));
  auto* third = static_cast<char*>(new_arena(kArena));
  ASSERT_TRUE(first != nullptr && second != nullptr && third != nullptr);
  EXPECT_EQ(address(first) % (2 * kArena), 0U);
  EXPECT_EQ(second, first + kArena);
  EXPECT_EQ(address(third) % (2 * kArena), 0U);
  for (char* arena : {first, second, third}) {
    EXPECT_EQ(arena[kArena - 1], 0);
    arena[kArena - 1] = 1;
  }
  EXPECT_EQ(new_arena(3 * kArena), nullptr);
}

TEST(Heap, WhatIsAllocatedAfterFillingLiesSideBySide) {
  if (!kOwnMalloc) GTEST_SKIP() << "the sanitizer's malloc has no such heap";
  constexpr std::size_t kSize = 3'000;  // no list of a thread's own keeps it
  std::vector<void*> holes(400);
  for (void*& hole : holes) hole = std::malloc(kSize);
  for (std::size_t i = 0; i < holes.size(); i += 2) std::free(holes[i]);
  EXPECT_GE(fill_free_chunks(), kSize * (holes.size() / 2 - 1));
  std::uint64_t last = address(holes.back());
  for (int i = 0; i < 20; ++i) {
    const std::uint64_t next = address(std::malloc(kSize));
    EXPECT_GT(next, last);
    EXPECT_LT(next, last + 200'000) << i;
    last = next;
  }
  for (std::size_t i = 1; i < holes.size(); i += 2) std::free(holes[i]);
}

TEST(Heap, ALibrarysCodeAndConstantsBecomeOneMapping) {
  const std::size_t before = file_mappings();
  join_file_mappings();
  const std::size_t after = file_mappings();
  EXPECT_LE(after + 6, before) << "of the program, libc and libstdc++ at least";
  EXPECT_EQ(std::to_string(after), std::to_string(file_mappings())) << "and code runs as before";
}

}  // namespace
}  // namespace thor
