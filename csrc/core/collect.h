// Files that a snippet leaves for its owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "util/unique_fd.h"

namespace thor {

inline constexpr std::size_t kMaxCollectBytes = 3'072;  // of all paths, their NULs included
inline constexpr std::uint64_t kMaxCollectedSize = std::uint64_t{32} << 20;  // of all contents

// In the zygote, when nobody of the jail is left: opens the regular files that `paths` (NUL-ended,
// up to an empty one) name below the working directory. No symbolic link is followed: a link could
// name what only the zygote may read. Bit i of `found` says that path i is among them.
std::vector<UniqueFd> collect_files(const char* paths, std::uint64_t* found);

// In the orchestrator: the contents, by path, as long as they fit kMaxCollectedSize together.
std::map<std::string, std::string> read_collected(const std::vector<std::string>& paths,
                                                  std::uint64_t found,
                                                  const std::vector<UniqueFd>& files);

}  // namespace thor
