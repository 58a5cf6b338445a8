// The messages between orchestrator and zygote: one SOCK_SEQPACKET datagram each, same machine,
// same build, hence plain structs.
//
//   zygote -> orchestrator   kReady                           serving
//                            kStartFailed {error}             cannot serve; exits
//                            kStarted     {slot} + pidfd      the child runs: its clock starts
//                            kExited      {slot, ...}         it and all its descendants are gone
//   orchestrator -> zygote   kRun         {slot, limits}      + payload, stdin, stdout, stderr
//
// A close of the orchestrator's end makes the zygote exit; its pid namespace goes with it.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "core/setup_error.h"
#include "thor/execution.h"
#include "util/unique_fd.h"

namespace thor {

enum class MessageKind : std::uint32_t { kReady, kStartFailed, kStarted, kExited, kRun };

struct Usage {
  std::int64_t cpu_ns = 0;
  std::int64_t peak_bytes = 0;
};

struct Message {
  MessageKind kind = MessageKind::kReady;
  std::uint32_t slot = 0;
  SetupError error;                  // kStartFailed; kExited when the child could not be set up
  Limits limits;                     // kRun
  std::int32_t snippet_status = -1;  // kExited: wait status of the snippet, -1 if it was killed
  std::int32_t init_status = 0;      // kExited: wait status of its pid namespace's init
  bool out_of_memory = false;        // kExited: the guest's own word, used only to refine an error
  Usage usage;                       // kExited
};
static_assert(std::is_trivially_copyable_v<Message>);

inline constexpr int kMaxFds = 4;
inline constexpr int kControlFd = 3;  // where the zygote finds its end

// Sends one message with file descriptors. False with errno set when the peer is gone.
bool send_message(int socket, const Message& message, std::span<const int> fds = {});

enum class Received : std::uint8_t { kMessage, kNothing, kClosed };

// Takes the next message. kNothing: none waits (non-blocking socket) or a signal came.
Received receive_message(int socket, Message* message, std::vector<UniqueFd>* fds);

}  // namespace thor
