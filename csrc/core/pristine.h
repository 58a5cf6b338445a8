// Whether a snippet left any trace in its jail's files. A jail that is not pristine is not reused.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/setup_error.h"
#include "util/unique_fd.h"

namespace thor {

// A writable directory as it was before any snippet ran, and the file system it is on.
class PristineDirectory {
 public:
  // Remembers `path` as it is now.
  static SetupError remember(const std::string& path, std::vector<PristineDirectory>* all);

  // Nothing was made, removed or renamed in it since, not even for a moment (its times would tell),
  // its owner and mode are the same, and nothing occupies its file system that did not before.
  [[nodiscard]] bool untouched() const;

 private:
  struct State {
    std::uint64_t mode = 0;
    std::uint64_t owner = 0;
    std::uint64_t links = 0;
    std::int64_t changed_s = 0;
    std::int64_t changed_ns = 0;
    std::int64_t modified_s = 0;
    std::int64_t modified_ns = 0;
    std::uint64_t free_blocks = 0;
    std::uint64_t free_inodes = 0;
    friend bool operator==(const State&, const State&) = default;
  };
  static bool look(int fd, State* state);

  UniqueFd directory_;
  State state_;
};

}  // namespace thor
