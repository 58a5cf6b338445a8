#include "core/landlock.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>

#include "util/kernel_abi.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

constexpr int kLeastAbi = 2;
constexpr int kWritableIndex = 100;
constexpr int kDeviceIndex = 200;

// What a file can be asked for; the rest concerns directories, and a rule on a file refuses it.
constexpr std::uint64_t kFileAccess =
    kLandlockExecute | kLandlockWriteFile | kLandlockReadFile | kLandlockTruncate;
constexpr std::uint64_t kReadAccess = kLandlockExecute | kLandlockReadFile | kLandlockReadDir;
// Not kLandlockMakeChar, kLandlockMakeBlock or kLandlockIoctlDev: nothing inside needs devices.
constexpr std::uint64_t kWriteAccess = kLandlockWriteFile | kLandlockTruncate | kLandlockRemoveDir |
                                       kLandlockRemoveFile | kLandlockMakeDir | kLandlockMakeReg |
                                       kLandlockMakeSock | kLandlockMakeFifo | kLandlockMakeSym |
                                       kLandlockRefer;
constexpr std::uint64_t kAllAccess =
    kReadAccess | kWriteAccess | kLandlockMakeChar | kLandlockMakeBlock | kLandlockIoctlDev;

constexpr std::array<const char*, 5> kWritableDevices{"/dev/null", "/dev/zero", "/dev/full",
                                                      "/dev/random", "/dev/urandom"};

// The kernel refuses to handle a right it does not know.
LandlockRulesetAttr everything_known_to(int abi) {
  LandlockRulesetAttr attr;
  attr.handled_access_fs = kAllAccess;
  if (abi < 3) attr.handled_access_fs &= ~kLandlockTruncate;
  if (abi < 5) attr.handled_access_fs &= ~kLandlockIoctlDev;
  if (abi >= 4) attr.handled_access_net = kLandlockBindTcp | kLandlockConnectTcp;
  if (abi >= 6) attr.scoped = kLandlockScopeAbstractSocket | kLandlockScopeSignal;
  return attr;
}

SetupError allow(int ruleset, const char* path, std::uint64_t access, int index) {
  const UniqueFd fd(::open(path, O_PATH | O_CLOEXEC));
  if (!fd) return failed(SetupStep::kLandlock, index);
  LandlockPathBeneathAttr rule;
  rule.allowed_access = access;
  rule.parent_fd = fd.get();
  if (::syscall(kSysLandlockAddRule, ruleset, kLandlockRulePathBeneath, &rule, 0U) != 0) {
    return failed(SetupStep::kLandlock, index);
  }
  return {};
}

}  // namespace

int landlock_abi() {
  const long abi = ::syscall(kSysLandlockCreateRuleset, nullptr, 0U, kLandlockCreateRulesetVersion);
  return abi < 0 ? 0 : static_cast<int>(abi);
}

SetupError restrict_files(const std::vector<std::string>& writable) {
  const int abi = landlock_abi();
  if (abi < kLeastAbi) return {SetupStep::kLandlock, EOPNOTSUPP, 0};
  const LandlockRulesetAttr attr = everything_known_to(abi);
  const UniqueFd ruleset(
      static_cast<int>(::syscall(kSysLandlockCreateRuleset, &attr, sizeof(attr), 0U)));
  if (!ruleset) return failed(SetupStep::kLandlock, 1);
  if (const SetupError e = allow(ruleset.get(), "/", kReadAccess, 2)) return e;
  const std::uint64_t write = kWriteAccess & attr.handled_access_fs;
  for (std::size_t i = 0; i < writable.size(); ++i) {
    const int index = kWritableIndex + static_cast<int>(i);
    if (const SetupError e = allow(ruleset.get(), writable[i].c_str(), write, index)) return e;
  }
  for (std::size_t i = 0; i < kWritableDevices.size(); ++i) {
    const int index = kDeviceIndex + static_cast<int>(i);
    const std::uint64_t access = write & kFileAccess;
    if (const SetupError e = allow(ruleset.get(), kWritableDevices[i], access, index)) return e;
  }
  // A hostile process would otherwise fill the host's audit log with its refusals.
  const std::uint32_t flags = abi >= 7 ? kLandlockLogSameExecOff : 0;
  if (::syscall(kSysLandlockRestrictSelf, ruleset.get(), flags) != 0) {
    return failed(SetupStep::kLandlock, 3);
  }
  return {};
}

}  // namespace thor
