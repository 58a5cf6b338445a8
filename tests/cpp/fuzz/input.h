// What a fuzz target takes from its input, piece by piece. Past its end all bytes are 0.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace thor {

class Input {
 public:
  Input(const unsigned char* data, std::size_t size)
      : left_(reinterpret_cast<const char*>(data), size) {}

  [[nodiscard]] bool empty() const { return left_.empty(); }

  // A digit as text is its value, so that a corpus can be read.
  std::size_t below(std::size_t limit) { return (byte() ^ unsigned{'0'}) % limit; }

  unsigned char byte() {
    const std::string_view taken = take(1);
    return taken.empty() ? 0 : static_cast<unsigned char>(taken[0]);
  }

  std::string_view take(std::size_t length) {
    const std::string_view taken = left_.substr(0, length);
    left_.remove_prefix(taken.size());
    return taken;
  }

  // Up to `separator`, which is taken too.
  std::string_view until(char separator) {
    const std::size_t end = left_.find(separator);
    const std::string_view taken = take(end);
    if (end != std::string_view::npos) left_.remove_prefix(1);
    return taken;
  }

 private:
  std::string_view left_;
};

inline void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace thor
