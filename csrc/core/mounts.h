// The file system a jail and a snippet see.
#pragma once

#include <string>
#include <vector>

#include "core/setup_error.h"
#include "util/unique_fd.h"

namespace thor {

// A host path, held open so that it can be mounted after its name can no longer be reached.
struct MountSource {
  std::string path;
  UniqueFd fd;
  bool device = false;
};

// Opens `readonly_paths`, leaving out what lies below another of them, and a few devices.
SetupError open_sources(const std::vector<std::string>& readonly_paths,
                        std::vector<MountSource>* sources);

// Replaces the root of this mount namespace by a read-only tmpfs with the sources at their places,
// a /proc of this pid namespace, and empty /tmp and /dev/shm. Nothing else of the host remains.
SetupError build_root(const std::vector<MountSource>& sources);

// Those of `paths` that a mount on /tmp hides.
std::vector<std::string> paths_under_tmp(const std::vector<std::string>& paths);

// What is fresh for each snippet: /tmp, /dev/shm and /proc. `shadowed` shows through /tmp.
SetupError mount_private(const std::vector<std::string>& shadowed);

}  // namespace thor
