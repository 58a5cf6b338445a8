// The file system that a jail and its snippets see.
#pragma once

#include <string>
#include <vector>

#include "core/pristine.h"
#include "core/setup_error.h"
#include "util/unique_fd.h"

namespace thor {

inline constexpr const char* kTemporary = "/tmp";
inline constexpr const char* kSharedMemory = "/dev/shm";
inline constexpr const char* kWorkingDirectory = "/tmp/work";
inline constexpr unsigned kSnippetUid = 1000;  // in the jail's user namespace; its group too

// A host path, held open so that it can be mounted after its name can no longer be reached.
struct MountSource {
  std::string path;
  UniqueFd fd;
  bool device = false;
};

// Opens `readonly_paths`, leaving out what lies below another of them, and a few devices.
SetupError open_sources(const std::vector<std::string>& readonly_paths,
                        std::vector<MountSource>* sources);

// What a jail's zygote keeps of it.
struct JailFiles {
  std::vector<PristineDirectory> writable;
  UniqueFd full_proc;  // the mount that the read-only one covers; no snippet can reach it
  UniqueFd last_pid;   // ns_last_pid of this pid namespace; empty where the kernel has none
  UniqueFd sockets;    // how many sockets there are in this network namespace
};

// Replaces the root of this mount namespace by a read-only tmpfs with the sources at their places,
// a /proc of this pid namespace, and a /tmp and /dev/shm of their own. Nothing else of the host
// remains. `shadowed` are the read-only paths below /tmp.
SetupError build_root(const std::vector<MountSource>& sources,
                      const std::vector<std::string>& shadowed, JailFiles* files);

// Those of `paths` that a mount on /tmp hides.
std::vector<std::string> paths_under_tmp(const std::vector<std::string>& paths);

}  // namespace thor
