// One running snippet as the orchestrator sees it, and the verdict on what became of it.
#pragma once

#include <cstdint>
#include <memory>

#include "core/deadlines.h"
#include "core/output_buffer.h"
#include "core/protocol.h"
#include "thor/completion_queue.h"
#include "thor/execution.h"
#include "util/unique_fd.h"

namespace thor {

// A request with whoever waits for it.
struct Job {
  std::uint64_t ticket = 0;
  Request request;
  std::shared_ptr<CompletionQueue> sink;
};

// Why we killed a snippet, if we did.
enum class KillReason : std::uint8_t { kNone, kTimeout, kOutput, kCancelled };

struct Slot {
  explicit Slot(Job what);

  // Reads what is in the pipes now. False once a stream exceeds the flood limit.
  bool drain_output();

  Job job;
  UniqueFd pidfd;  // of the pid namespace's init; empty until the zygote says it started
  UniqueFd stdout_read;
  UniqueFd stderr_read;
  OutputBuffer stdout_text;
  OutputBuffer stderr_text;
  Clock::time_point started;
  KillReason killed = KillReason::kNone;
};

// Beyond this many times max_output_bytes a stream is a flood and its writer is killed; up to it
// the snippet may go on, so that the tail, where answers and tracebacks stand, is kept.
inline constexpr std::uint64_t kFloodFactor = 16;

// The result of a snippet whose processes are all gone.
Result conclude(const Slot& slot, const Message& exited, Clock::time_point now);

// A request we could not serve, with what failed.
Result infra(std::string error);

}  // namespace thor
