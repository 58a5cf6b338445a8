// Keeps the first and the last half of a stream, however long the stream is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace thor {

class OutputBuffer {
 public:
  explicit OutputBuffer(std::size_t capacity);

  void append(std::string_view data);

  [[nodiscard]] std::uint64_t total() const { return total_; }
  [[nodiscard]] bool truncated() const { return total_ > capacity_; }

  // All of the stream, or its head, a line that says how much is missing, and its tail.
  [[nodiscard]] std::string text() const;

 private:
  std::size_t capacity_;
  std::size_t head_capacity_;
  std::uint64_t total_ = 0;
  std::string head_;
  std::string tail_;  // a ring once full: tail_start_ is its oldest byte
  std::size_t tail_start_ = 0;
};

}  // namespace thor
