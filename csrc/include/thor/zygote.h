// The side of the sandbox that runs inside the warm interpreter's process.
//
//   template   exec'd, warmed, in the host's namespaces; runs no snippet; one per tier
//     └ zygote   a fork of it in a jail of its own, pid 1 there; one snippet at a time
//         └ snippet   a fork of that, pid 2
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace thor {

// The walls a caller may do without, where a host does not grant them. User, pid and mount
// namespaces, dropped capabilities and rlimits are not among them: without those there is no jail.
enum class Layer : std::uint32_t {
  kNetwork = 1U << 0,
  kIpc = 1U << 1,
  kUts = 1U << 2,
  kCgroup = 1U << 3,
  kTime = 1U << 4,
  kSeccomp = 1U << 5,
  kLandlock = 1U << 6,
};

constexpr std::uint32_t bit(Layer layer) { return static_cast<std::uint32_t>(layer); }

struct JailSpec {
  // What a snippet can see of the host's file system, all of it read-only. Paths are absolute; a
  // path that is a symbolic link is recreated as one.
  std::vector<std::string> readonly_paths;
  // Layers whose absence is an error; one that is not named is used where the host grants it.
  std::uint32_t required_layers = ~0U;
  // The tree's memory is bounded by a control group; otherwise the zygote watches it.
  bool memory_cgroup = false;
  // This process removes the tree below it when its owner is gone; empty: there is none.
  std::string cgroup_path;
};

// What the guest is handed with a snippet.
struct GuestJob {
  std::string payload;  // Request::payload
  // Where the guest may say that the snippet died of an allocation failure.
  volatile bool* out_of_memory = nullptr;
  bool has_dialogue = false;  // kDialogueFd is open
};

// The language runtime's part. `context` is passed through.
struct GuestHooks {
  void* context = nullptr;
  // Around the fork that makes a jail's zygote.
  void (*before_fork)(void* context) = nullptr;
  void (*after_fork_parent)(void* context) = nullptr;
  void (*after_fork_child)(void* context) = nullptr;
  // In the zygote, before it forks the next snippet's process, whose random numbers `seed` is for.
  void (*refresh)(void* context, std::uint64_t seed) = nullptr;
  // Runs the snippet in its own process; returns its exit code.
  int (*run)(void* context, const GuestJob& job) = nullptr;
};

// Serves requests for jails on `control_fd` until the other end closes. Does not return: the
// process exits. The caller must be single-threaded.
[[noreturn]] void serve_template(int control_fd, const JailSpec& jail, const GuestHooks& hooks);

}  // namespace thor
