#include "core/handover.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <system_error>

namespace thor {
namespace {

std::system_error failure(const char* what) { return {errno, std::generic_category(), what}; }

}  // namespace

UniqueFd input_file(const std::string& data) {
  UniqueFd fd(::memfd_create("thor-input", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw failure("memfd_create");
  std::size_t done = 0;
  while (done < data.size()) {
    const ssize_t n = ::write(fd.get(), data.data() + done, data.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw failure("writing a memfd");
    done += static_cast<std::size_t>(n);
  }
  constexpr int kSeals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
  if (::lseek(fd.get(), 0, SEEK_SET) != 0 || ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    throw failure("sealing a memfd");
  }
  return fd;
}

}  // namespace thor
