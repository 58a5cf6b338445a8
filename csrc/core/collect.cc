#include "core/collect.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/mounts.h"
#include "core/protocol.h"

namespace thor {
namespace {

// Component by component: the call that could do it at once is not on the list of the filter that
// the zygote lives under too.
UniqueFd open_beneath(const std::string& path) {
  UniqueFd at(::open(kWorkingDirectory, O_PATH | O_DIRECTORY | O_CLOEXEC));
  std::size_t begin = 0;
  while (at && begin != std::string::npos) {
    const std::size_t end = path.find('/', begin);
    const std::string part = path.substr(begin, end == std::string::npos ? end : end - begin);
    begin = end == std::string::npos ? end : end + 1;
    if (part.empty() || part == ".") continue;
    if (part == "..") return UniqueFd();
    // A named pipe must not hold us up.
    const int flags =
        begin == std::string::npos ? O_RDONLY | O_NONBLOCK | O_NOCTTY : O_PATH | O_DIRECTORY;
    at.reset(::openat(at.get(), part.c_str(), flags | O_NOFOLLOW | O_CLOEXEC));
  }
  return at;
}

bool read_whole(int fd, std::uint64_t most, std::string* out) {
  struct stat info{};
  if (::fstat(fd, &info) != 0 || static_cast<std::uint64_t>(info.st_size) > most) return false;
  out->resize(static_cast<std::size_t>(info.st_size));
  std::size_t done = 0;
  while (done < out->size()) {
    const ssize_t n = ::pread(fd, out->data() + done, out->size() - done, static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += static_cast<std::size_t>(n);
  }
  return true;
}

}  // namespace

std::vector<UniqueFd> collect_files(const char* paths, std::uint64_t* found) {
  std::vector<UniqueFd> files;
  *found = 0;
  if (*paths == '\0') return files;
  for (std::size_t i = 0; i < kMaxCollected && *paths != '\0'; ++i) {
    UniqueFd file = open_beneath(paths);
    struct stat info{};
    if (file && ::fstat(file.get(), &info) == 0 && S_ISREG(info.st_mode)) {
      *found |= std::uint64_t{1} << i;
      files.push_back(std::move(file));
    }
    paths += std::strlen(paths) + 1;
  }
  return files;
}

std::map<std::string, std::string> read_collected(const std::vector<std::string>& paths,
                                                  std::uint64_t found,
                                                  const std::vector<UniqueFd>& files) {
  std::map<std::string, std::string> out;
  std::uint64_t left = kMaxCollectedSize;
  std::size_t next = 0;
  for (std::size_t i = 0; i < std::min(paths.size(), kMaxCollected) && next < files.size(); ++i) {
    if ((found >> i & 1U) == 0) continue;
    std::string text;
    if (!read_whole(files[next++].get(), left, &text)) continue;
    left -= text.size();
    out.emplace(paths[i], std::move(text));
  }
  return out;
}

}  // namespace thor
