#include "core/pristine.h"

#include <fcntl.h>
#include <sys/statfs.h>

#include <array>
#include <utility>

namespace thor {

SetupError PristineDirectory::remember(const std::string& path,
                                       std::vector<PristineDirectory>* all) {
  PristineDirectory directory;
  directory.directory_.reset(::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  // The kernel's clock for files ticks every few milliseconds: a change within the tick of our own
  // would go unseen if the directory's time were now.
  const std::array<timespec, 2> epoch{};
  if (!directory.directory_ || ::utimensat(AT_FDCWD, path.c_str(), epoch.data(), 0) != 0 ||
      !look(directory.directory_.get(), &directory.state_)) {
    return failed(SetupStep::kPristine, static_cast<int>(all->size()));
  }
  all->push_back(std::move(directory));
  return {};
}

bool PristineDirectory::untouched() const {
  State now;
  return look(directory_.get(), &now) && now == state_;
}

bool PristineDirectory::look(int fd, State* state) {
  struct stat info{};
  struct statfs usage{};
  if (::fstat(fd, &info) != 0 || ::fstatfs(fd, &usage) != 0) return false;
  state->mode = info.st_mode;
  state->owner = (std::uint64_t{info.st_uid} << 32) | info.st_gid;
  state->links = info.st_nlink;
  state->changed_s = info.st_ctim.tv_sec;
  state->changed_ns = info.st_ctim.tv_nsec;
  state->modified_s = info.st_mtim.tv_sec;
  state->modified_ns = info.st_mtim.tv_nsec;
  state->free_blocks = usage.f_bfree;
  state->free_inodes = usage.f_ffree;
  return true;
}

}  // namespace thor
