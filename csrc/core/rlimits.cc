#include "core/rlimits.h"

#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <memory>

namespace thor {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
// Address space is not memory: thread stacks and malloc arenas reserve far more than they touch.
constexpr std::uint64_t kAddressSpaceSlack = 512 * kMiB;
constexpr std::uint64_t kFileSize = 64 * kMiB;  // as large as the tmpfs it can write to
constexpr std::uint64_t kStack = 8 * kMiB;      // the usual default; threads reserve this much each
constexpr std::uint64_t kOpenFiles = 256;

struct Limit {
  __rlimit_resource_t resource;
  rlim_t soft;
  rlim_t hard;
};

}  // namespace

MemoryBaseline measure_memory_baseline() {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> statm(std::fopen("/proc/self/statm", "re"),
                                                              &std::fclose);
  unsigned long size = 0;
  unsigned long data = 0;
  if (!statm || std::fscanf(statm.get(), "%lu %*u %*u %*u %*u %lu", &size, &data) != 2) return {};
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return {size * page, data * page};
}

SetupError apply_rlimits(const Limits& limits, const MemoryBaseline& baseline,
                         std::uint32_t processes_of_ours) {
  const auto cpu_s =
      static_cast<rlim_t>(std::chrono::ceil<std::chrono::seconds>(limits.cpu).count());
  const rlim_t data = baseline.data_bytes + limits.memory_bytes;
  const rlim_t space = baseline.address_space_bytes + limits.memory_bytes + kAddressSpaceSlack;
  const rlim_t processes = limits.max_processes + processes_of_ours;
  const std::array<Limit, 10> table{{
      {RLIMIT_CPU, cpu_s, cpu_s + 1},  // SIGXCPU first, SIGKILL for who ignores it
      {RLIMIT_DATA, data, data},
      {RLIMIT_AS, space, space},
      {RLIMIT_FSIZE, kFileSize, kFileSize},
      {RLIMIT_STACK, kStack, kStack},
      {RLIMIT_NOFILE, kOpenFiles, kOpenFiles},
      {RLIMIT_NPROC, processes, processes},
      {RLIMIT_CORE, 0, 0},
      {RLIMIT_MEMLOCK, 0, 0},
      {RLIMIT_MSGQUEUE, 0, 0},
  }};
  int index = 0;
  for (const Limit& limit : table) {
    rlimit value{limit.soft, limit.hard};
    rlimit now{};
    // A host may have given us less already; the lower bound stands.
    if (::getrlimit(limit.resource, &now) == 0) {
      if (now.rlim_max < value.rlim_max) value.rlim_max = now.rlim_max;
      if (value.rlim_cur > value.rlim_max) value.rlim_cur = value.rlim_max;
    }
    if (::setrlimit(limit.resource, &value) != 0) return failed(SetupStep::kRlimits, index);
    ++index;
  }
  return {};
}

}  // namespace thor
