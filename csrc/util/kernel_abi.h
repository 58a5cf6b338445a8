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
inline constexpr long kSysLandlockCreateRuleset = 444;
inline constexpr long kSysLandlockAddRule = 445;
inline constexpr long kSysLandlockRestrictSelf = 446;

inline constexpr int kMadvCollapse = 25;    // Linux 6.1
inline constexpr int kCloneNewTime = 0x80;  // Linux 5.6
inline constexpr std::uint64_t kClonePidfd = 0x1000;
inline constexpr std::uint32_t kOfdSetLock = 37;  // F_OFD_SETLK: glibc hides it from strict C++
inline constexpr std::uint32_t kOfdSetLockWait = 38;
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

// Landlock (Linux 5.13). What the versions of its ABI added is said at each group.
inline constexpr std::uint32_t kLandlockCreateRulesetVersion = 1;
inline constexpr int kLandlockRulePathBeneath = 1;
inline constexpr std::uint64_t kLandlockExecute = 1U << 0;
inline constexpr std::uint64_t kLandlockWriteFile = 1U << 1;
inline constexpr std::uint64_t kLandlockReadFile = 1U << 2;
inline constexpr std::uint64_t kLandlockReadDir = 1U << 3;
inline constexpr std::uint64_t kLandlockRemoveDir = 1U << 4;
inline constexpr std::uint64_t kLandlockRemoveFile = 1U << 5;
inline constexpr std::uint64_t kLandlockMakeChar = 1U << 6;
inline constexpr std::uint64_t kLandlockMakeDir = 1U << 7;
inline constexpr std::uint64_t kLandlockMakeReg = 1U << 8;
inline constexpr std::uint64_t kLandlockMakeSock = 1U << 9;
inline constexpr std::uint64_t kLandlockMakeFifo = 1U << 10;
inline constexpr std::uint64_t kLandlockMakeBlock = 1U << 11;
inline constexpr std::uint64_t kLandlockMakeSym = 1U << 12;
inline constexpr std::uint64_t kLandlockRefer = 1U << 13;               // 2
inline constexpr std::uint64_t kLandlockTruncate = 1U << 14;            // 3
inline constexpr std::uint64_t kLandlockIoctlDev = 1U << 15;            // 5
inline constexpr std::uint64_t kLandlockBindTcp = 1U << 0;              // 4
inline constexpr std::uint64_t kLandlockConnectTcp = 1U << 1;           // 4
inline constexpr std::uint64_t kLandlockScopeAbstractSocket = 1U << 0;  // 6
inline constexpr std::uint64_t kLandlockScopeSignal = 1U << 1;          // 6
inline constexpr std::uint32_t kLandlockLogSameExecOff = 1U << 0;       // 7

// struct landlock_ruleset_attr, ABI 6. Older kernels take it as long as what they lack is 0.
struct LandlockRulesetAttr {
  std::uint64_t handled_access_fs = 0;
  std::uint64_t handled_access_net = 0;
  std::uint64_t scoped = 0;
};

// struct landlock_path_beneath_attr, ABI 1.
struct __attribute__((packed)) LandlockPathBeneathAttr {
  std::uint64_t allowed_access = 0;
  std::int32_t parent_fd = -1;
};

}  // namespace thor
