// Kernel interfaces newer than the headers of the oldest system we build on (manylinux_2_28 has
// those of Linux 4.18). System call numbers from 424 on are the same on every architecture.
#pragma once

#include <cstdint>

namespace thor {

inline constexpr long kSysPidfdSendSignal = 424;
inline constexpr long kSysPidfdOpen = 434;
inline constexpr long kSysClone3 = 435;
inline constexpr long kSysCloseRange = 436;
inline constexpr long kSysMountSetattr = 442;

inline constexpr std::uint64_t kClonePidfd = 0x1000;
inline constexpr std::uint64_t kMountAttrReadOnly = 0x1;
inline constexpr std::uint64_t kMountAttrNoSuid = 0x2;
inline constexpr std::uint64_t kMountAttrNoDev = 0x4;

// struct clone_args, version 0 (Linux 5.3).
struct CloneArgs {
  std::uint64_t flags = 0;
  std::uint64_t pidfd = 0;
  std::uint64_t child_tid = 0;
  std::uint64_t parent_tid = 0;
  std::uint64_t exit_signal = 0;
  std::uint64_t stack = 0;
  std::uint64_t stack_size = 0;
  std::uint64_t tls = 0;
};

// struct mount_attr, version 0 (Linux 5.12).
struct MountAttr {
  std::uint64_t attr_set = 0;
  std::uint64_t attr_clr = 0;
  std::uint64_t propagation = 0;
  std::uint64_t userns_fd = 0;
};

}  // namespace thor
