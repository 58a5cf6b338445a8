#include "core/slot.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

namespace thor {
namespace {

// Empties a non-blocking pipe into `text`. False once that has seen more than `flood`: whoever
// writes as fast as we read would otherwise keep us here.
bool drain(int pipe, std::uint64_t flood, OutputBuffer* text) {
  std::array<char, 1 << 16> chunk;  // as large as a pipe usually is
  while (text->total() <= flood) {
    const ssize_t n = ::read(pipe, chunk.data(), chunk.size());
    if (n > 0) {
      text->append({chunk.data(), static_cast<std::size_t>(n)});
    } else if (n == 0 || errno != EINTR) {
      return true;
    }
  }
  return false;
}

Status status_of_exit(int code, bool truncated, bool out_of_memory) {
  if (code == 0) return truncated ? Status::kOutput : Status::kOk;
  return out_of_memory ? Status::kMemory : Status::kError;
}

Status status_of_signal(int signal, const Result& result, const Limits& limits) {
  if (signal == SIGSYS) return Status::kKilled;
  if (signal == SIGXCPU) return Status::kTimeout;
  // Past the soft CPU limit a snippet that ignores SIGXCPU is killed by the kernel.
  if (signal == SIGKILL && result.cpu >= limits.cpu) return Status::kTimeout;
  return Status::kError;
}

Result output_of(const Slot& slot, Clock::time_point now) {
  Result result;
  result.stdout_data = slot.output.stdout_text.text();
  result.stderr_data = slot.output.stderr_text.text();
  result.truncated = slot.output.stdout_text.truncated() || slot.output.stderr_text.truncated();
  result.wall = slot.output.wall + (now - slot.started);
  return result;
}

}  // namespace

bool Slot::drain(int standard_output, int standard_error) {
  const std::uint64_t flood = kFloodFactor * job.request.limits.max_output_bytes;
  const bool first = thor::drain(standard_output, flood, &output.stdout_text);
  const bool second = thor::drain(standard_error, flood, &output.stderr_text);
  return first && second;
}

Result infra(std::string error) {
  Result result;
  result.status = Status::kInfra;
  result.error = std::move(error);
  return result;
}

Result conclude(const Slot& slot, const Ending& ending, Clock::time_point now) {
  const Message& exited = ending.exited;
  if (slot.killed == KillReason::kCancelled) return infra("cancelled by the caller");
  if (exited.error) return infra(describe(exited.error));
  if (!exited.started) return infra("the snippet's process was killed before it started");

  Result result = output_of(slot, now);
  result.cpu = std::chrono::nanoseconds(exited.usage.cpu_ns);
  result.peak_memory_bytes = static_cast<std::uint64_t>(exited.usage.peak_bytes);
  const int status = exited.snippet_status;
  if (slot.killed != KillReason::kNone) {
    result.status = slot.killed == KillReason::kTimeout ? Status::kTimeout : Status::kOutput;
    // It waited for processes that its memory limit had taken.
    if (result.status == Status::kTimeout && ending.killed_for_memory) {
      result.status = Status::kMemory;
    }
    result.signal = SIGKILL;
  } else if (WIFSIGNALED(status)) {
    result.signal = WTERMSIG(status);
    result.status = status_of_signal(result.signal, result, slot.job.request.limits);
    if (result.signal == SIGKILL && ending.killed_for_memory) result.status = Status::kMemory;
  } else {
    result.exit_code = WEXITSTATUS(status);
    // A memory limit may have taken a child of the snippet, which then failed for lack of it.
    const bool memory = exited.out_of_memory || ending.killed_for_memory;
    result.status = status_of_exit(result.exit_code, result.truncated, memory);
  }
  return result;
}

Result conclude_step(Slot* slot, std::string reply, bool accumulate, Clock::time_point now) {
  Result result;
  if (accumulate) {
    slot->output.wall += now - slot->started;
    result.wall = now - slot->started;
  } else {
    result = output_of(*slot, now);
  }
  result.status = result.truncated ? Status::kOutput : Status::kOk;
  result.reply = std::move(reply);
  return result;
}

}  // namespace thor
