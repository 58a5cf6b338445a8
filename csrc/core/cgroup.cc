#include "core/cgroup.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "util/kernel_abi.h"
#include "util/kernel_text.h"
#include "util/pidfd.h"

namespace thor {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kGroupTeardown{500};
constexpr std::chrono::milliseconds kTreeTeardown{5'000};
constexpr std::chrono::milliseconds kRetry{1};
// Any limit will do to see that one can be set; nothing ever runs under this one.
constexpr std::uint64_t kTrialBytes = std::uint64_t{64} << 20;

CgroupError failed_on(const char* action, std::string path) {
  return {action, std::move(path), errno};
}

CgroupError write_file(const std::string& path, std::string_view text) {
  return write_text(path, text) ? CgroupError{} : failed_on("writing", path);
}

// --- what is inside -----------------------------------------------------------------------------

// Members of other pid namespaces than ours and its children read as 0, which kill() would take for
// our own process group.
std::vector<pid_t> members(const std::string& group) {
  std::vector<pid_t> pids;
  const std::string text = read_text(group + "/cgroup.procs").value_or("");
  for (const std::string_view line : split(text, '\n')) {
    const std::optional<std::uint64_t> pid = to_number(line);
    if (pid.value_or(0) > 0) pids.push_back(static_cast<pid_t>(*pid));
  }
  return pids;
}

void kill_members(const std::string& group) {
  // v2 has one atomic kill since Linux 5.14.
  if (!write_file(group + "/cgroup.kill", "1")) return;
  std::vector<std::pair<pid_t, UniqueFd>> held;
  for (const pid_t pid : members(group)) {
    UniqueFd pidfd(static_cast<int>(::syscall(kSysPidfdOpen, pid, 0U)));
    if (pidfd) held.emplace_back(pid, std::move(pidfd));
  }
  // Read again: a number that was reused by a stranger before we held it is no longer listed.
  const std::vector<pid_t> still = members(group);
  for (const auto& [pid, pidfd] : held) {
    if (std::ranges::find(still, pid) != still.end()) pidfd_signal(pidfd.get(), SIGKILL);
  }
}

std::vector<std::string> subgroups(const std::string& group) {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator entry(group, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->symlink_status(error).type() == fs::file_type::directory) {
      found.push_back(entry->path().string());
    }
  }
  return found;
}

// The kernel refuses to remove a group with members, and a killed one takes a moment to die.
CgroupError remove_until(const std::string& group, Clock::time_point deadline) {
  for (;;) {
    for (const std::string& child : subgroups(group)) {
      if (const CgroupError e = remove_until(child, deadline)) return e;
    }
    if (::rmdir(group.c_str()) == 0 || errno == ENOENT) return {};
    if (errno != EBUSY || Clock::now() > deadline) return failed_on("removing", group);
    kill_members(group);
    std::this_thread::sleep_for(kRetry);
  }
}

// --- pools of others ----------------------------------------------------------------------------

struct PoolName {
  unsigned long long pid_namespace = 0;
  int pid = 0;
  unsigned long long start_ticks = 0;  // tells the owner from a later process with its pid
  unsigned number = 0;
};

constexpr const char* kNameFormat = "thor-%llu-%d-%llu-%u%n";

std::string to_string(const PoolName& name) {
  return "thor-" + std::to_string(name.pid_namespace) + "-" + std::to_string(name.pid) + "-" +
         std::to_string(name.start_ticks) + "-" + std::to_string(name.number);
}

std::optional<PoolName> parse_pool_name(const std::string& text) {
  PoolName name;
  int length = 0;
  const int fields = std::sscanf(text.c_str(), kNameFormat, &name.pid_namespace, &name.pid,
                                 &name.start_ticks, &name.number, &length);
  const bool whole = fields == 4 && static_cast<std::size_t>(length) == text.size();
  return whole ? std::optional(name) : std::nullopt;
}

std::optional<std::uint64_t> start_ticks(const std::string& pid) {
  const std::string stat = read_text("/proc/" + pid + "/stat").value_or("");
  // The command, in parentheses, may itself hold spaces and parentheses. Field 22 is the 20th
  // after.
  const std::size_t command_end = stat.rfind(") ");
  if (command_end == std::string::npos) return std::nullopt;
  const std::string_view rest = std::string_view(stat).substr(command_end + 2);
  const std::vector<std::string_view> fields = split(rest, ' ');
  return fields.size() < 20 ? std::nullopt : to_number(fields[19]);
}

PoolName next_pool_name() {
  static std::atomic<unsigned> count{0};
  struct stat info{};
  ::stat("/proc/self/ns/pid", &info);
  return {info.st_ino, ::getpid(), start_ticks("self").value_or(0), count++};
}

// Only who shares our pid namespace can be judged by pid. In doubt it is alive.
bool owner_is_dead(const PoolName& name, const PoolName& own) {
  if (name.pid_namespace != own.pid_namespace || name.pid <= 0) return false;
  if (::kill(name.pid, 0) != 0 && errno == ESRCH) return true;
  const std::optional<std::uint64_t> start = start_ticks(std::to_string(name.pid));
  return start && *start != name.start_ticks;
}

void remove_stale_pools(const std::string& parent, const PoolName& own) {
  for (const std::string& group : subgroups(parent)) {
    const std::optional<PoolName> name = parse_pool_name(fs::path(group).filename());
    // One that cannot be removed is no obstacle: the next discovery tries again.
    if (name && owner_is_dead(*name, own)) remove_until(group, Clock::now() + kGroupTeardown);
  }
}

// v2: lets the children of `group` have the memory controller. The kernel answers EBUSY where the
// group has processes itself.
CgroupError enable_memory(const std::string& group) {
  const std::string available = group + "/cgroup.controllers";
  const std::string enabled = group + "/cgroup.subtree_control";
  const auto lists_memory = [](std::string text) {
    if (text.ends_with('\n')) text.pop_back();
    return has_word(text, ' ', "memory");
  };
  const std::optional<std::string> controllers = read_text(available);
  if (!controllers) return failed_on("reading", available);
  if (!lists_memory(*controllers)) return {"looking for 'memory' in", available, EOPNOTSUPP};
  if (lists_memory(read_text(enabled).value_or(""))) return {};
  return write_file(enabled, "+memory");
}

}  // namespace

std::string describe(const CgroupError& error) {
  return std::string(error.action) + " " + error.path + ": " +
         std::generic_category().message(error.error_number) + " (errno " +
         std::to_string(error.error_number) + ")";
}

CgroupError Cgroup::open(CgroupVersion version, const std::string& path, Cgroup* group) {
  const bool v1 = version == CgroupVersion::kV1;
  Cgroup opened;
  opened.version_ = version;
  opened.path_ = path;
  const std::string procs = opened.file("cgroup.procs");
  opened.procs_.reset(::open(procs.c_str(), O_WRONLY | O_CLOEXEC));
  if (!opened.procs_) return failed_on("opening", procs);
  const std::string events = opened.file(v1 ? "memory.oom_control" : "memory.events");
  opened.events_.reset(::open(events.c_str(), O_RDONLY | O_CLOEXEC));
  if (!opened.events_) return failed_on("opening", events);
  // v2 before 6.12 has a peak that cannot be reset, before 5.19 none.
  const std::string peak = opened.file(v1 ? "memory.max_usage_in_bytes" : "memory.peak");
  opened.peak_.reset(::open(peak.c_str(), O_RDWR | O_CLOEXEC));
  if (!opened.peak_) opened.peak_.reset(::open(peak.c_str(), O_RDONLY | O_CLOEXEC));
  opened.owner_ = ::getpid();
  *group = std::move(opened);
  return {};
}

Cgroup& Cgroup::operator=(Cgroup&& other) noexcept {
  if (this == &other) return *this;
  remove();
  version_ = other.version_;
  path_ = std::move(other.path_);
  procs_ = std::move(other.procs_);
  events_ = std::move(other.events_);
  peak_ = std::move(other.peak_);
  owner_ = std::exchange(other.owner_, 0);
  return *this;
}

CgroupError Cgroup::attach(pid_t pid) const {
  const std::string text = std::to_string(pid);
  if (::write(procs_.get(), text.data(), text.size()) < 0) {
    return failed_on("writing", file("cgroup.procs"));
  }
  return {};
}

CgroupError Cgroup::set_memory_limit(std::uint64_t bytes) const {
  const std::string text = std::to_string(bytes);
  if (version_ == CgroupVersion::kV2) {
    CgroupError swap = write_file(file("memory.swap.max"), "0");
    if (swap && swap.error_number != ENOENT) return swap;  // a kernel without swap has no such file
    return write_file(file("memory.max"), text);
  }
  // v1 keeps memory <= memory + swap at every moment: the first write works when lowering, the
  // last one when raising.
  const std::string limit = file("memory.limit_in_bytes");
  const bool lowered = !write_file(limit, text);
  CgroupError with_swap = write_file(file("memory.memsw.limit_in_bytes"), text);
  if (with_swap.error_number == ENOENT) {  // swap is not accounted here: use none
    if (CgroupError e = write_file(file("memory.swappiness"), "0")) return e;
  } else if (with_swap) {
    return with_swap;
  }
  return lowered ? CgroupError{} : write_file(limit, text);
}

std::optional<std::uint64_t> Cgroup::oom_kills() const {
  constexpr std::string_view kKey = "oom_kill ";
  const std::string text = read_text(events_.get()).value_or("");
  for (const std::string_view line : split(text, '\n')) {
    if (line.starts_with(kKey)) return to_number(line.substr(kKey.size()));
  }
  return std::nullopt;
}

std::optional<std::uint64_t> Cgroup::peak_bytes() const {
  return to_number(read_text(peak_.get()).value_or(""));
}

CgroupError Cgroup::reset_peak() const {
  // v2 resets what this descriptor reads, not what others do.
  if (::write(peak_.get(), "0", 1) >= 0) return {};
  const bool v1 = version_ == CgroupVersion::kV1;
  CgroupError error =
      failed_on("resetting", file(v1 ? "memory.max_usage_in_bytes" : "memory.peak"));
  // No such file, opened for reading only, or (root may open any) nothing there that takes a write.
  if (error.error_number == EBADF || error.error_number == EINVAL) error.error_number = EOPNOTSUPP;
  return error;
}

CgroupError Cgroup::kill_all() const {
  const Clock::time_point deadline = Clock::now() + kGroupTeardown;
  while (!members(path_).empty()) {
    if (Clock::now() > deadline) return {"emptying", path_, ETIMEDOUT};
    kill_members(path_);
    std::this_thread::sleep_for(kRetry);
  }
  return {};
}

CgroupError Cgroup::remove() {
  if (std::exchange(owner_, 0) != ::getpid()) return {};
  return remove_until(path_, Clock::now() + kGroupTeardown);
}

CgroupPool::CgroupPool(const MemoryHierarchy& hierarchy)
    : version_(hierarchy.version), reason_(hierarchy.reason), owner_(::getpid()) {
  if (version_ == CgroupVersion::kNone) return;
  std::vector<std::string> parents{hierarchy.directory};
  // v2 gives no controllers to children of a group with processes, and we are in ours: a sibling
  // of it is the other choice, if the parent can be seen and is ours to write to.
  if (version_ == CgroupVersion::kV2 && hierarchy.directory != hierarchy.mount) {
    parents.push_back(fs::path(hierarchy.directory).parent_path());
  }
  for (const std::string& parent : parents) {
    const CgroupError error = settle_in(parent);
    if (!error) {
      reason_.clear();
      return;
    }
    if (!path_.empty()) ::rmdir(path_.c_str());
    path_.clear();
    reason_ += (reason_.empty() ? "" : "; ") + describe(error);
  }
  version_ = CgroupVersion::kNone;
}

CgroupError CgroupPool::settle_in(const std::string& parent) {
  if (version_ == CgroupVersion::kV2) {
    if (CgroupError e = enable_memory(parent)) return e;
    // Moving a process needs this file of the closest common ancestor, too.
    const std::string procs = parent + "/cgroup.procs";
    if (::faccessat(AT_FDCWD, procs.c_str(), W_OK, AT_EACCESS) != 0) {
      return failed_on("checking for write access to", procs);
    }
  }
  const PoolName name = next_pool_name();
  remove_stale_pools(parent, name);
  const std::string path = parent + "/" + to_string(name);
  if (::mkdir(path.c_str(), S_IRWXU | S_IRGRP | S_IXGRP | S_IROTH | S_IXOTH) != 0) {
    return failed_on("creating", path);
  }
  path_ = path;
  if (version_ == CgroupVersion::kV2) {
    if (CgroupError e = enable_memory(path_)) return e;
  }
  Cgroup trial;
  if (CgroupError e = create("trial", &trial)) return e;
  if (CgroupError e = trial.set_memory_limit(kTrialBytes)) return e;
  return trial.remove();
}

CgroupPool::~CgroupPool() {
  if (!path_.empty() && owner_ == ::getpid()) remove_cgroup_tree(path_);
}

CgroupError CgroupPool::create(const std::string& name, Cgroup* group) const {
  const std::string path = path_ + "/" + name;
  if (::mkdir(path.c_str(), S_IRWXU | S_IRGRP | S_IXGRP | S_IROTH | S_IXOTH) != 0) {
    return failed_on("creating", path);
  }
  CgroupError error = Cgroup::open(version_, path, group);
  if (error) ::rmdir(path.c_str());
  return error;
}

CgroupError remove_cgroup_tree(const std::string& path) {
  return remove_until(path, Clock::now() + kTreeTeardown);
}

}  // namespace thor
