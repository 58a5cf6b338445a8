#include "core/slot.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <utility>

namespace thor {
namespace {

// Empties a non-blocking pipe into `text`; closes it at its end.
void drain(UniqueFd* pipe, OutputBuffer* text) {
  std::array<char, 1 << 16> chunk;  // as large as a pipe usually is
  while (*pipe) {
    const ssize_t n = ::read(pipe->get(), chunk.data(), chunk.size());
    if (n > 0) {
      text->append({chunk.data(), static_cast<std::size_t>(n)});
    } else if (n == 0) {
      pipe->reset();
    } else if (errno != EINTR) {
      return;
    }
  }
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

}  // namespace

Slot::Slot(Job what)
    : job(std::move(what)),
      stdout_text(job.request.limits.max_output_bytes),
      stderr_text(job.request.limits.max_output_bytes) {}

bool Slot::drain_output() {
  drain(&stdout_read, &stdout_text);
  drain(&stderr_read, &stderr_text);
  const std::uint64_t flood = kFloodFactor * job.request.limits.max_output_bytes;
  return stdout_text.total() <= flood && stderr_text.total() <= flood;
}

Result infra(std::string error) {
  Result result;
  result.status = Status::kInfra;
  result.error = std::move(error);
  return result;
}

Result conclude(const Slot& slot, const Message& exited, Clock::time_point now) {
  if (slot.killed == KillReason::kCancelled) return infra("cancelled by the caller");
  if (exited.error) return infra(describe(exited.error));

  Result result;
  result.stdout_data = slot.stdout_text.text();
  result.stderr_data = slot.stderr_text.text();
  result.truncated = slot.stdout_text.truncated() || slot.stderr_text.truncated();
  result.wall = now - slot.started;
  result.cpu = std::chrono::nanoseconds(exited.usage.cpu_ns);
  result.peak_memory_bytes = static_cast<std::uint64_t>(exited.usage.peak_bytes);

  const int status = exited.snippet_status;
  if (slot.killed != KillReason::kNone) {
    result.status = slot.killed == KillReason::kTimeout ? Status::kTimeout : Status::kOutput;
    result.signal = SIGKILL;
  } else if (status == -1) {
    return infra("the snippet's init was killed from outside (wait status " +
                 std::to_string(exited.init_status) + ")");
  } else if (WIFSIGNALED(status)) {
    result.signal = WTERMSIG(status);
    result.status = status_of_signal(result.signal, result, slot.job.request.limits);
  } else {
    result.exit_code = WEXITSTATUS(status);
    result.status = status_of_exit(result.exit_code, result.truncated, exited.out_of_memory);
  }
  return result;
}

}  // namespace thor
