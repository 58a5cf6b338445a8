// The side of the sandbox that runs inside the warm interpreter's process.
#pragma once

#include <string>
#include <vector>

namespace thor {

// What a snippet can see of the host's file system, all of it read-only. Paths are absolute; a
// path that is a symbolic link is recreated as one.
struct JailSpec {
  std::vector<std::string> readonly_paths;
  unsigned host_uid = 64999;  // who snippets are on the host when we start as root
};

// The language runtime's part. `context` is passed through.
struct GuestHooks {
  void* context = nullptr;
  void (*before_fork)(void* context) = nullptr;
  void (*after_fork_parent)(void* context) = nullptr;
  void (*after_fork_child)(void* context) = nullptr;
  // Runs the snippet in its own process; returns its exit code. `payload` is Request::payload.
  // `*out_of_memory` may be set to say that the snippet died of an allocation failure.
  int (*run)(void* context, const std::string& payload, volatile bool* out_of_memory) = nullptr;
};

// Enters the jail and serves requests on `control_fd` until the other end closes. Does not return:
// the process exits. The caller must be single-threaded.
[[noreturn]] void serve_zygote(int control_fd, const JailSpec& jail, const GuestHooks& hooks);

}  // namespace thor
