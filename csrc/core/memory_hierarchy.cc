#include "core/memory_hierarchy.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "util/kernel_text.h"

namespace thor {
namespace {

namespace fs = std::filesystem;

struct Mount {
  std::string root;  // the group at the mount point: not "/" for a bind mount into a container
  std::string point;
  std::string_view type;
  std::string_view options;  // of the file system: a v1 hierarchy's controllers are among them
};

// mountinfo writes space, tab, newline and backslash as \040 and so on.
std::string unescape(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    unsigned code = 0;
    const char* digits = text.data() + i + 1;
    if (text[i] == '\\' && text.size() - i > 3 &&
        std::from_chars(digits, digits + 3, code, 8).ptr == digits + 3) {
      out.push_back(static_cast<char>(code));
      i += 3;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

std::optional<Mount> parse_mount(std::string_view line) {
  const std::vector<std::string_view> fields = split(line, ' ');
  // A variable number of optional fields ends with a lone "-".
  constexpr std::size_t kFixedFields = 6;
  if (fields.size() < kFixedFields) return std::nullopt;
  const auto dash = std::find(fields.begin() + kFixedFields, fields.end(), "-");
  if (fields.end() - dash < 4) return std::nullopt;
  return Mount{unescape(fields[3]), unescape(fields[4]), dash[1], dash[3]};
}

// The own group's path in the v1 hierarchy with the memory controller, or else in v2's.
struct OwnGroup {
  CgroupVersion version = CgroupVersion::kNone;
  std::string path;
};

OwnGroup parse_own_group(std::string_view own_groups) {
  OwnGroup found;
  for (const std::string_view line : split(own_groups, '\n')) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string_view::npos || second == std::string_view::npos) continue;
    const std::string_view controllers = line.substr(first + 1, second - first - 1);
    const std::string path(line.substr(second + 1));
    if (has_word(controllers, ',', "memory")) return {CgroupVersion::kV1, path};
    if (line.starts_with("0::")) found = {CgroupVersion::kV2, path};
  }
  return found;
}

MemoryHierarchy nowhere(std::string reason) {
  return {CgroupVersion::kNone, {}, {}, std::move(reason)};
}

}  // namespace

MemoryHierarchy find_memory_hierarchy(std::string_view mountinfo, std::string_view own_groups) {
  const OwnGroup own = parse_own_group(own_groups);
  if (own.version == CgroupVersion::kNone) {
    return nowhere("/proc/self/cgroup names no group for 'memory', expected a v1 or v2 one");
  }
  const bool v1 = own.version == CgroupVersion::kV1;
  MemoryHierarchy found =
      nowhere(std::string("no ") + (v1 ? "cgroup (v1) file system with 'memory'" : "cgroup2") +
              " is mounted");
  for (const std::string_view line : split(mountinfo, '\n')) {
    const std::optional<Mount> mount = parse_mount(line);
    if (!mount || mount->type != (v1 ? "cgroup" : "cgroup2")) continue;
    if (v1 && !has_word(mount->options, ',', "memory")) continue;
    const fs::path below = fs::path(own.path).lexically_relative(mount->root);
    if (below.empty() || *below.begin() == "..") {
      if (found.version == CgroupVersion::kNone) {
        found.reason = "own group " + own.path + " is not below " + mount->root +
                       ", which is what " + mount->point + " shows";
      }
      continue;
    }
    // Not the first: a later mount hides an earlier one at the same place.
    const fs::path directory = below == "." ? fs::path(mount->point) : mount->point / below;
    found = {own.version, mount->point, directory.string(), {}};
  }
  return found;
}

MemoryHierarchy find_memory_hierarchy() {
  const std::optional<std::string> mounts = read_text("/proc/self/mountinfo");
  const std::optional<std::string> groups = read_text("/proc/self/cgroup");
  if (!mounts || !groups) {
    return nowhere("reading /proc/self/mountinfo and /proc/self/cgroup: " +
                   std::generic_category().message(errno) + " (errno " + std::to_string(errno) +
                   ")");
  }
  return find_memory_hierarchy(*mounts, *groups);
}

}  // namespace thor
