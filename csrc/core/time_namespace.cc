#include "core/time_namespace.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <ctime>
#include <string>

#include "util/kernel_abi.h"
#include "util/unique_fd.h"

namespace thor {

SetupError enter_time_namespace(int proc) {
  if (::unshare(kCloneNewTime) != 0) return failed(SetupStep::kTimeNamespace, 0);
  timespec monotonic{};
  timespec since_boot{};
  ::clock_gettime(CLOCK_MONOTONIC, &monotonic);
  ::clock_gettime(CLOCK_BOOTTIME, &since_boot);
  const std::string offsets = "monotonic -" + std::to_string(monotonic.tv_sec) + " 0\nboottime -" +
                              std::to_string(since_boot.tv_sec) + " 0\n";
  const UniqueFd fd(::openat(proc, "self/timens_offsets", O_WRONLY | O_CLOEXEC));
  if (!fd || ::write(fd.get(), offsets.data(), offsets.size()) < 0) {
    return failed(SetupStep::kTimeNamespace, 1);
  }
  return {};
}

}  // namespace thor
