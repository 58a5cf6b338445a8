// A failing step of jail set-up, small enough to cross a fork: {step, errno, index}.
#pragma once

#include <cstdint>
#include <string>

namespace thor {

enum class SetupStep : std::int32_t {
  kNone,
  kSingleThread,
  kParentGone,
  kUnshare,
  kIdMaps,
  kSetIds,
  kRootTmpfs,
  kPivotRoot,
  kBind,
  kDevice,
  kProc,
  kReadOnlyRoot,
  kCloneJail,
  kCgroup,
  kTimeNamespace,
  kLandlock,
  kPristine,
  kSharedPages,
  kSeed,
  kPipes,
  kForkSnippet,
  kSession,
  kHostname,
  kWorkTmpfs,
  kOomScore,
  kFileDescriptors,
  kWorkingDirectory,
  kRlimits,
  kCapabilities,
  kNoNewPrivileges,
  kSeccomp,
  kPayload,
};

struct SetupError {
  SetupStep step = SetupStep::kNone;
  std::int32_t error_number = 0;
  std::int32_t index = 0;  // which mount, which limit, ...: meaning depends on the step

  explicit operator bool() const { return step != SetupStep::kNone; }
};

// errno now, as an error of `step`.
SetupError failed(SetupStep step, int index = 0);

// "bind-mounting a read-only path [3]: Operation not permitted (errno 1)"
std::string describe(const SetupError& error);

}  // namespace thor
