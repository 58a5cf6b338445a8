// One request being served as the orchestrator sees it, and the verdict on what became of it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "core/deadlines.h"
#include "core/output_buffer.h"
#include "core/protocol.h"
#include "thor/completion_queue.h"
#include "thor/execution.h"

namespace thor {

// A request with whoever waits for it.
struct Job {
  std::uint64_t ticket = 0;
  Request request;
  std::uint64_t dialogue = 0;              // 0: a snippet of its own
  std::shared_ptr<const Request> opening;  // of the dialogue
  std::shared_ptr<CompletionQueue> sink;
  int attempts = 0;  // to start it
};

// Why we killed a snippet, if we did.
enum class KillReason : std::uint8_t { kNone, kTimeout, kOutput, kCancelled };

// What was written, and in how much time.
struct Output {
  explicit Output(std::uint64_t max_output_bytes)
      : stdout_text(max_output_bytes), stderr_text(max_output_bytes) {}

  OutputBuffer stdout_text;
  OutputBuffer stderr_text;
  std::chrono::nanoseconds wall{0};
};

struct Slot {
  explicit Slot(Job what) : job(std::move(what)), output(job.request.limits.max_output_bytes) {}

  // Reads what is in the pipes now; one that is closed (-1) holds nothing. False once a stream
  // exceeds the flood limit.
  bool drain(int standard_output, int standard_error);

  // Until when it may run, given when it started.
  [[nodiscard]] Clock::time_point deadline() const {
    return started + (job.request.limits.timeout - output.wall);
  }

  // When it has run for so long, `keeping`, that others need not wait for it.
  [[nodiscard]] Clock::time_point ages(std::chrono::nanoseconds keeping) const {
    return started + keeping;
  }

  // When it has also used up a quarter of its time.
  [[nodiscard]] Clock::time_point is_late(std::chrono::nanoseconds keeping) const {
    return std::max(ages(keeping), started + (deadline() - started) / 4);
  }

  Job job;
  Output output;
  Clock::time_point started;
  KillReason killed = KillReason::kNone;
  bool aged = false;  // see ages()
  bool late = false;  // see is_late(); then it is aged too
};

// Beyond this many times max_output_bytes a stream is a flood and its writer is killed; up to it
// the snippet may go on, so that the tail, where answers and tracebacks stand, is kept.
inline constexpr std::uint64_t kFloodFactor = 16;

// What the kernel and the zygote say of a snippet whose processes are all gone.
struct Ending {
  Message exited;
  bool killed_for_memory = false;  // by its control group, or by the zygote that watches it
};

// The result of a snippet that is over.
Result conclude(const Slot& slot, const Ending& ending, Clock::time_point now);

// The result of a dialogue's step whose process lives on; `reply` is its guest's. With `accumulate`
// the output stays in the slot for the next one.
Result conclude_step(Slot* slot, std::string reply, bool accumulate, Clock::time_point now);

// A request we could not serve, with what failed.
Result infra(std::string error);

}  // namespace thor
