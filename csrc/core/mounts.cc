#include "core/mounts.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <climits>
#include <filesystem>
#include <system_error>

#include "util/kernel_abi.h"

namespace thor {
namespace {

namespace fs = std::filesystem;

// Any directory every system has will do: it is covered only in our own mount namespace.
constexpr const char* kStaging = "/tmp";
constexpr const char* kOldRoot = "/.host";
constexpr unsigned long kTmpfsFlags = MS_NOSUID | MS_NODEV;
// Sizes bound what a snippet can store; inode counts bound what it can make of nothing.
constexpr const char* kRootOptions = "size=1m,nr_inodes=1024,mode=755";
// noatime is a flag: reading must leave no trace in a jail that another snippet may get.
constexpr unsigned long kPrivateFlags = kTmpfsFlags | MS_NOATIME;
constexpr std::array<const char*, 5> kDevices{"/dev/null", "/dev/zero", "/dev/full", "/dev/random",
                                              "/dev/urandom"};

// Where `path` is while the new root is still mounted at the staging directory.
std::string staged(const std::string& path) { return kStaging + path; }

bool make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) errno = error.value();
  return !error;
}

bool make_file(const fs::path& path) {
  if (!make_directories(path.parent_path())) return false;
  return static_cast<bool>(
      UniqueFd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, S_IRUSR | S_IWUSR)));
}

bool bind(int source, const std::string& target) {
  const std::string link = "/proc/self/fd/" + std::to_string(source);
  return ::mount(link.c_str(), target.c_str(), nullptr, MS_BIND | MS_REC, nullptr) == 0;
}

bool restrict_mount(const std::string& target, std::uint64_t attributes, unsigned flags) {
  MountAttr attr;
  attr.attr_set = attributes;
  return ::syscall(kSysMountSetattr, AT_FDCWD, target.c_str(), flags, &attr, sizeof(attr)) == 0;
}

bool is_below(const fs::path& path, const fs::path& directory) {
  const fs::path relative = path.lexically_relative(directory);
  return !relative.empty() && *relative.begin() != "..";
}

bool recreate_link(int source, const std::string& target) {
  std::array<char, PATH_MAX> text{};
  const ssize_t n = ::readlinkat(source, "", text.data(), text.size() - 1);
  return n > 0 && make_directories(fs::path(target).parent_path()) &&
         ::symlink(text.data(), target.c_str()) == 0;
}

bool place(const MountSource& source) {
  const std::string target = staged(source.path);
  struct stat info{};
  if (::fstat(source.fd.get(), &info) != 0) return false;
  if (S_ISLNK(info.st_mode)) return recreate_link(source.fd.get(), target);
  const bool made = S_ISDIR(info.st_mode) ? make_directories(target) : make_file(target);
  if (!made || !bind(source.fd.get(), target)) return false;
  constexpr std::uint64_t kCommon = kMountAttrReadOnly | kMountAttrNoSuid;
  return restrict_mount(target, source.device ? kCommon : kCommon | kMountAttrNoDev, AT_RECURSIVE);
}

SetupError mount_proc(const std::string& target, const char* options) {
  constexpr unsigned long kFlags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  if (::mount("proc", target.c_str(), "proc", kFlags, options) != 0) {
    return failed(SetupStep::kProc);
  }
  return {};
}

SetupError pivot_to_staging() {
  const std::string old_root = staged(kOldRoot);
  if (::mkdir(old_root.c_str(), S_IRWXU) != 0) return failed(SetupStep::kPivotRoot, 0);
  if (::syscall(SYS_pivot_root, kStaging, old_root.c_str()) != 0) {
    return failed(SetupStep::kPivotRoot, 1);
  }
  if (::chdir("/") != 0) return failed(SetupStep::kPivotRoot, 2);
  if (::umount2(kOldRoot, MNT_DETACH) != 0) return failed(SetupStep::kPivotRoot, 3);
  return ::rmdir(kOldRoot) == 0 ? SetupError{} : failed(SetupStep::kPivotRoot, 4);
}

std::string private_options(int mebibytes, int inodes) {
  const std::string id = std::to_string(kSnippetUid);
  return "size=" + std::to_string(mebibytes) + "m,nr_inodes=" + std::to_string(inodes) +
         ",mode=700,uid=" + id + ",gid=" + id;
}

// The kernel grants a new /proc only where an unobstructed one is still in sight: the first mount,
// covered by the second, which shows processes only, and of those only the snippet's own.
SetupError mount_own_proc(JailFiles* files) {
  files->full_proc.reset(::open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC));
  // Absent on kernels without checkpoint/restore: there, pid numbers go on counting.
  files->last_pid.reset(::open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC));
  files->sockets.reset(::open("/proc/self/net/sockstat", O_RDONLY | O_CLOEXEC));
  if (!files->full_proc) return failed(SetupStep::kProc, 1);
  if (!files->sockets) return failed(SetupStep::kProc, 3);
  if (const SetupError e = mount_proc("/proc", "subset=pid,hidepid=ptraceable")) return e;
  // A snippet could otherwise lower its OOM score, to name one file of many.
  if (!restrict_mount("/proc", kMountAttrReadOnly, 0)) return failed(SetupStep::kProc, 2);
  return {};
}

SetupError mount_private(const std::vector<std::string>& shadowed,
                         std::vector<PristineDirectory>* writable) {
  std::vector<UniqueFd> sources;
  for (const std::string& path : shadowed) {
    sources.emplace_back(::open(path.c_str(), O_PATH | O_CLOEXEC));
  }
  if (::mount("tmpfs", kTemporary, "tmpfs", kPrivateFlags, private_options(64, 4096).c_str()) !=
      0) {
    return failed(SetupStep::kWorkTmpfs, 0);
  }
  if (::mount("tmpfs", kSharedMemory, "tmpfs", kPrivateFlags | MS_NOEXEC,
              private_options(64, 256).c_str()) != 0) {
    return failed(SetupStep::kWorkTmpfs, 1);
  }
  for (std::size_t i = 0; i < shadowed.size(); ++i) {
    if (!sources[i] || !make_directories(shadowed[i]) || !bind(sources[i].get(), shadowed[i])) {
      return failed(SetupStep::kBind, static_cast<int>(i));
    }
  }
  if (::mkdir(kWorkingDirectory, S_IRWXU) != 0 ||
      ::chown(kWorkingDirectory, kSnippetUid, kSnippetUid) != 0) {
    return failed(SetupStep::kWorkingDirectory, 0);
  }
  for (const char* path : {kTemporary, kWorkingDirectory, kSharedMemory}) {
    if (const SetupError e = PristineDirectory::remember(path, writable)) return e;
  }
  return {};
}

}  // namespace

SetupError open_sources(const std::vector<std::string>& readonly_paths,
                        std::vector<MountSource>* sources) {
  const auto open_one = [sources](const std::string& path, bool device) {
    UniqueFd fd(::open(path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    if (!fd) return false;
    sources->push_back({path, std::move(fd), device});
    return true;
  };
  for (std::size_t i = 0; i < readonly_paths.size(); ++i) {
    bool covered = false;
    for (const MountSource& earlier : *sources) {
      covered = covered || is_below(readonly_paths[i], earlier.path);
    }
    if (!covered && !open_one(readonly_paths[i], false)) {
      return failed(SetupStep::kBind, static_cast<int>(i));
    }
  }
  for (std::size_t i = 0; i < kDevices.size(); ++i) {
    if (!open_one(kDevices[i], true)) return failed(SetupStep::kDevice, static_cast<int>(i));
  }
  return {};
}

SetupError build_root(const std::vector<MountSource>& sources,
                      const std::vector<std::string>& shadowed, JailFiles* files) {
  if (::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) {
    return failed(SetupStep::kRootTmpfs, 0);
  }
  if (::mount("tmpfs", kStaging, "tmpfs", kTmpfsFlags, kRootOptions) != 0) {
    return failed(SetupStep::kRootTmpfs, 1);
  }
  for (std::size_t i = 0; i < sources.size(); ++i) {
    if (!place(sources[i])) return failed(SetupStep::kBind, static_cast<int>(i));
  }
  for (const char* directory : {"/proc", kTemporary, kSharedMemory}) {
    if (!make_directories(staged(directory))) return failed(SetupStep::kRootTmpfs, 2);
  }
  if (const SetupError e = mount_proc(staged("/proc"), nullptr)) return e;
  if (const SetupError e = pivot_to_staging()) return e;
  if (!restrict_mount("/", kMountAttrReadOnly, 0)) return failed(SetupStep::kReadOnlyRoot);
  if (const SetupError e = mount_private(shadowed, &files->writable)) return e;
  return mount_own_proc(files);
}

std::vector<std::string> paths_under_tmp(const std::vector<std::string>& paths) {
  std::vector<std::string> out;
  for (const std::string& path : paths) {
    if (is_below(path, kTemporary)) out.push_back(path);
  }
  return out;
}

}  // namespace thor
