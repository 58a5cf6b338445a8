// The messages between orchestrator, templates and jails: one SOCK_SEQPACKET datagram each, same
// machine, same build, hence plain structs.
//
//   template -> orchestrator   kReady                       warmed, can make jails
//                              kStartFailed {error}         cannot; exits
//   orchestrator -> template   kMakeJail {uid_offset}       + the jail's end of its socket
//                                                             [+ cgroup.procs of its group]
//   on the jail's own socket, then:
//   template -> orchestrator   kJailMade                    + pidfd of its zygote
//                              kStartFailed {error}         no jail: the socket closes
//   zygote -> orchestrator     kParked {layers}             + pidfd, stdout, stderr of a child that
//                                                             waits for what to run
//                              kExited {...}                it and all its descendants are gone
//                                                             [+ files it left that were asked for]
//   orchestrator -> child      kRun {limits, ...}           + payload inline or as a file
//                                                             [+ stdin] [+ dialogue]
//   orchestrator -> guest      kStep                        + what to do next, as a file; on the
//                                                             dialogue, where it answers in bytes
//
// A close of the orchestrator's end makes the other exit; a jail's pid namespace goes with it.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "core/setup_error.h"
#include "thor/execution.h"
#include "util/unique_fd.h"

namespace thor {

enum class MessageKind : std::uint32_t {
  kReady,
  kStartFailed,
  kMakeJail,
  kJailMade,
  kParked,
  kRun,
  kExited,
  kStep,
};

struct Usage {
  std::int64_t cpu_ns = 0;
  std::int64_t peak_bytes = 0;
};

struct Message {
  MessageKind kind = MessageKind::kReady;
  SetupError error;              // kStartFailed; kExited when the child could not be set up
  std::uint32_t uid_offset = 0;  // kMakeJail: which of the snippets' host uids it gets
  std::uint32_t layers = 0;      // kParked: bits of thor::Layer in force
  Limits limits;                 // kRun
  // kRun: which descriptors come along, in this order. Without a file the payload is inline.
  bool payload_is_file = false;
  bool has_stdin = false;
  bool has_dialogue = false;
  std::uint32_t collect_bytes = 0;  // the payload begins with so many of NUL-ended paths
  // kExited. Its descriptors are the files to collect, as many as bits in `collected`.
  std::uint64_t collected = 0;       // which of the paths there are
  bool started = false;              // the child took a kRun
  bool pristine = false;             // the jail goes on; otherwise it exits
  bool out_of_memory = false;        // the guest's own word, used only to refine an error
  bool tree_out_of_memory = false;   // the watchdog's verdict
  std::int32_t snippet_status = -1;  // wait status of the snippet's main process
  Usage usage;                       // of the whole tree
};
static_assert(std::is_trivially_copyable_v<Message>);

inline constexpr std::size_t kMaxCollected = 32;  // files of one snippet
inline constexpr std::size_t kMaxFds = kMaxCollected;
inline constexpr int kControlFd = 3;   // where template and zygote find their end
inline constexpr int kDialogueFd = 3;  // where a snippet's guest finds its dialogue, if it has one
// Longer payloads travel as files: a datagram must fit the socket's buffer.
inline constexpr std::size_t kMaxInlinePayload = std::size_t{32} << 10;

// Sends one message with file descriptors. False with errno set when the peer is gone or, on a
// non-blocking socket, does not read.
bool send_message(int socket, const Message& message, std::span<const int> fds = {},
                  std::string_view payload = {});

enum class Received : std::uint8_t { kMessage, kNothing, kClosed };

// Takes the next message. kNothing: none waits (non-blocking socket) or a signal came. kClosed: the
// peer is gone, or what it sent is no message. `payload` may be null where none is expected.
Received receive_message(int socket, Message* message, std::vector<UniqueFd>* fds,
                         std::string* payload = nullptr);

}  // namespace thor
