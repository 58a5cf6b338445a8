#include "core/output_buffer.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace thor {
namespace {

TEST(OutputBuffer, KeepsShortOutputWhole) {
  OutputBuffer buffer(8);
  buffer.append("abc");
  buffer.append("defgh");
  EXPECT_EQ(buffer.text(), "abcdefgh");
  EXPECT_FALSE(buffer.truncated());
}

TEST(OutputBuffer, KeepsHeadAndTailOfLongOutput) {
  OutputBuffer buffer(4);
  buffer.append("0123456789");
  EXPECT_TRUE(buffer.truncated());
  EXPECT_EQ(buffer.total(), 10U);
  EXPECT_EQ(buffer.text(), "01\n... [6 bytes omitted] ...\n89");
}

TEST(OutputBuffer, EmptyAndTinyCapacities) {
  OutputBuffer none(0);
  none.append("x");
  EXPECT_EQ(none.text(), "\n... [1 bytes omitted] ...\n");
  OutputBuffer one(1);
  one.append("xyz");
  EXPECT_EQ(one.text(), "x\n... [2 bytes omitted] ...\n");
}

// Whatever the chunks, the result is that of one append.
TEST(OutputBuffer, ChunkingDoesNotMatter) {
  std::mt19937 random(7);  // NOLINT(bugprone-random-generator-seed): the same cases every time
  for (std::size_t capacity = 0; capacity < 20; ++capacity) {
    for (std::size_t length = 0; length < 60; ++length) {
      std::string all;
      for (std::size_t i = 0; i < length; ++i) all.push_back(static_cast<char>('a' + i % 26));
      OutputBuffer whole(capacity);
      whole.append(all);
      OutputBuffer pieces(capacity);
      for (std::size_t at = 0; at < length;) {
        const std::size_t n = 1 + random() % 9;
        pieces.append(std::string_view(all).substr(at, n));
        at += n;
      }
      ASSERT_EQ(pieces.text(), whole.text()) << capacity << " " << length;
    }
  }
}

}  // namespace
}  // namespace thor
