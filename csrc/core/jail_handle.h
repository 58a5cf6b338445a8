// A jail as the orchestrator sees it: sockets, handles, and whose request it serves.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/cgroup.h"
#include "core/protocol.h"
#include "core/slot.h"
#include "util/unique_fd.h"

namespace thor {

struct JailHandle {
  enum class State : std::uint8_t { kPreparing, kParked, kRunning };

  std::uint32_t tier = 0;
  UniqueFd socket;
  UniqueFd zygote;  // pidfd
  State state = State::kPreparing;
  // Of the child that waits or runs.
  UniqueFd child;  // pidfd
  UniqueFd standard_output;
  UniqueFd standard_error;
  bool watched = false;  // epoll reports the two
  // Whose request it serves, or will once it is parked.
  std::optional<Slot> slot;
  // With a dialogue: which, and our end; the process outlives its steps.
  std::uint64_t dialogue = 0;
  UniqueFd dialogue_socket;
  Clock::time_point expires;
  std::optional<Output> so_far;  // where steps accumulate
};

// Sends the parked child what to run. Throws std::system_error when out of descriptors or memory.
// `opening` is the request that starts a dialogue, or the snippet itself.
void send_run(JailHandle* jail, const Request& opening);

// Sends a dialogue's guest its next step. Throws like send_run.
void send_step(const JailHandle& jail, const std::string& data);

inline constexpr std::size_t kMaxReply = std::size_t{32} << 10;

// Takes the guest's reply. Whatever is in it is the snippet's to choose.
enum class Reply : std::uint8_t { kReply, kNothing, kClosed };
Reply receive_reply(const JailHandle& jail, std::string* text);

}  // namespace thor
