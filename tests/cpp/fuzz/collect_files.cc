// The zygote's half of collecting: whatever the names are, only regular files below the working
// directory are opened. In a /tmp of this process alone, with links that lead out of it.
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <climits>
#include <cstdio>
#include <string>

#include "core/collect.h"
#include "core/id_maps.h"
#include "core/mounts.h"
#include "core/protocol.h"
#include "input.h"

namespace {

void make_file(const std::string& path) {
  const thor::UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT, S_IRUSR));
  thor::require(static_cast<bool>(fd));
}

std::string name_of(int fd) {
  std::array<char, PATH_MAX> text{};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t n = ::readlink(link.c_str(), text.data(), text.size());
  return {text.data(), static_cast<std::size_t>(n < 0 ? 0 : n)};
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  const uid_t uid = ::geteuid();
  const gid_t gid = ::getegid();
  if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0 ||
      thor::write_id_maps("/proc/self", {{0, uid, gid}}) ||
      ::mount("tmpfs", thor::kTemporary, "tmpfs", 0, nullptr) != 0) {
    std::perror("making a /tmp of its own, which needs user namespaces");
    std::exit(1);
  }
  const std::string work = thor::kWorkingDirectory;
  for (const std::string& directory : {work, work + "/d", work + "/d/e", std::string("/tmp/x")}) {
    thor::require(::mkdir(directory.c_str(), S_IRWXU) == 0);
  }
  for (const char* file : {"/a", "/d/a", "/d/e/a", "/...", "/\xff", "/../a", "/../x/a"}) {
    make_file(work + file);
  }
  const auto link = [&](const char* to, const char* name) {
    thor::require(::symlink(to, (work + name).c_str()) == 0);
  };
  link("/tmp/a", "/l");
  link("..", "/u");
  link("/", "/r");
  link("a", "/s");
  link("/proc/self/root", "/d/r");
  link("e", "/d/s");
  thor::require(::mkfifo((work + "/p").c_str(), S_IRWXU) == 0);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  // As the zygote has it: NUL-ended names, and behind the last one an empty one.
  std::array<char, thor::kMaxCollectBytes> names{};
  std::copy_n(data, std::min(size, names.size() - 1), names.begin());
  std::uint64_t found = ~std::uint64_t{0};
  const std::vector<thor::UniqueFd> files = thor::collect_files(names.data(), &found);
  thor::require(files.size() <= thor::kMaxFds);
  thor::require(static_cast<std::size_t>(std::popcount(found)) == files.size());
  for (const thor::UniqueFd& file : files) {
    struct stat info{};
    thor::require(::fstat(file.get(), &info) == 0 && S_ISREG(info.st_mode));
    thor::require(name_of(file.get()).starts_with(std::string(thor::kWorkingDirectory) + "/"));
  }
  return 0;
}
