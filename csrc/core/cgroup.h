// Memory control groups: what bounds a whole process tree where the host delegates them.
//
//   GROUP/                                  our own group, or (v2) its parent
//     thor-<pid ns>-<pid>-<start>-<n>/      CgroupPool; the name says whose it is
//       <name>/                             Cgroup: limit, counters, members
//
// No process but those attached is ever moved. Nothing here throws because of what the host lacks.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "core/memory_hierarchy.h"
#include "util/unique_fd.h"

namespace thor {

// What failed, on which file.
struct CgroupError {
  const char* action = "";
  std::string path;
  int error_number = 0;

  explicit operator bool() const { return error_number != 0; }
};

// "writing /sys/fs/cgroup/x/memory.max: Permission denied (errno 13)"
std::string describe(const CgroupError& error);

// One group. Its files are opened once, so that using it costs one system call each time.
class Cgroup {
 public:
  Cgroup() = default;  // none
  // Takes over the group at `path`.
  static CgroupError open(CgroupVersion version, const std::string& path, Cgroup* group);
  Cgroup(Cgroup&& other) noexcept { *this = std::move(other); }
  Cgroup& operator=(Cgroup&& other) noexcept;
  Cgroup(const Cgroup&) = delete;
  Cgroup& operator=(const Cgroup&) = delete;
  ~Cgroup() { remove(); }

  explicit operator bool() const { return owner_ != 0; }
  [[nodiscard]] const std::string& path() const { return path_; }

  // Writing a pid moves that process here, "0" the writer itself, also from another namespace.
  [[nodiscard]] int procs_fd() const { return procs_.get(); }
  CgroupError attach(pid_t pid) const;

  // Memory and swap together. What is over it already is reclaimed or killed.
  CgroupError set_memory_limit(std::uint64_t bytes) const;

  // Processes the kernel killed for memory since the group was made. Empty: it does not count them.
  [[nodiscard]] std::optional<std::uint64_t> oom_kills() const;

  // Most memory held at a time, in bytes, since creation or reset_peak(). Empty before Linux 5.19
  // (v2); a reset needs 6.12 there.
  [[nodiscard]] std::optional<std::uint64_t> peak_bytes() const;
  CgroupError reset_peak() const;

  // Until none is left; half a second at most.
  CgroupError kill_all() const;

  // Kills what is left inside and removes the group; half a second at most. A fork's copy, whose
  // original lives on, removes nothing.
  CgroupError remove();

 private:
  [[nodiscard]] std::string file(const char* name) const { return path_ + "/" + name; }

  CgroupVersion version_ = CgroupVersion::kNone;
  std::string path_;
  UniqueFd procs_;
  UniqueFd events_;
  UniqueFd peak_;
  pid_t owner_ = 0;
};

// A directory of this process for its groups, if the host lets it have one.
class CgroupPool {
 public:
  // Removes what pools of dead processes left, and tries the whole way once: directory, group,
  // limit. Afterwards version() says whether groups can be had, reason() why not.
  explicit CgroupPool(const MemoryHierarchy& hierarchy = find_memory_hierarchy());
  ~CgroupPool();
  CgroupPool(const CgroupPool&) = delete;
  CgroupPool& operator=(const CgroupPool&) = delete;

  [[nodiscard]] CgroupVersion version() const { return version_; }
  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const std::string& reason() const { return reason_; }

  // `name` is a file name, new in this pool.
  CgroupError create(const std::string& name, Cgroup* group) const;

 private:
  CgroupError settle_in(const std::string& parent);

  CgroupVersion version_ = CgroupVersion::kNone;
  std::string path_;
  std::string reason_;
  pid_t owner_ = 0;
};

// For who cleans up after a pool's owner was killed: kills what is inside and removes the tree;
// five seconds at most. A path that is gone is no error.
CgroupError remove_cgroup_tree(const std::string& path);

}  // namespace thor
