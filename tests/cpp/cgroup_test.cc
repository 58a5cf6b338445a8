#include "core/cgroup.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <system_error>
#include <utility>

#include "stub_sandbox.h"

namespace thor {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// --- where we are: texts of real systems, shortened ----------------------------------------------

constexpr const char* kV1Mounts =
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

TEST(MemoryHierarchy, V1NextToAnEmptyV2) {
  const MemoryHierarchy found =
      find_memory_hierarchy(kV1Mounts, "5:name=memory:/no\n4:cpu,memory:/a/b\n0::/c\n");
  EXPECT_EQ(found.version, CgroupVersion::kV1);
  EXPECT_EQ(found.mount, "/sys/fs/cgroup/memory");
  EXPECT_EQ(found.directory, "/sys/fs/cgroup/memory/a/b");
}

TEST(MemoryHierarchy, V2WhenNoV1HierarchyHasMemory) {
  const MemoryHierarchy found = find_memory_hierarchy(kV1Mounts, "1:cpu:/\n0::/user:x/c\n");
  EXPECT_EQ(found.version, CgroupVersion::kV2);
  EXPECT_EQ(found.directory, "/sys/fs/cgroup/unified/user:x/c");
}

TEST(MemoryHierarchy, AContainerSeesItsOwnGroupAtTheMountPoint) {
  const char* mounts = "9 8 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
  EXPECT_EQ(find_memory_hierarchy(mounts, "4:memory:/docker/abc\n").directory,
            "/sys/fs/cgroup/memory");
  EXPECT_EQ(find_memory_hierarchy(mounts, "4:memory:/docker/abc/x\n").directory,
            "/sys/fs/cgroup/memory/x");
}

TEST(MemoryHierarchy, WhatTheMountDoesNotShowIsSaid) {
  const char* mounts = "9 8 0:32 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
  const MemoryHierarchy found = find_memory_hierarchy(mounts, "0::/docker/other\n");
  EXPECT_EQ(found.version, CgroupVersion::kNone);
  EXPECT_EQ(found.reason,
            "own group /docker/other is not below /docker/abc, which is what /sys/fs/cgroup shows");
}

TEST(MemoryHierarchy, CgroupNamespaces) {
  // Mounted inside the namespace, and by a process above its root.
  const char* inside = "9 8 0:32 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
  EXPECT_EQ(find_memory_hierarchy(inside, "0::/\n").directory, "/sys/fs/cgroup");
  const char* above = "9 8 0:32 /.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
  EXPECT_EQ(find_memory_hierarchy(above, "0::/\n").version, CgroupVersion::kNone);
  EXPECT_EQ(find_memory_hierarchy(above, "0::/../sibling\n").directory, "/sys/fs/cgroup/sibling");
}

TEST(MemoryHierarchy, TheLaterMountHidesTheEarlierAndNamesAreUnescaped) {
  const char* mounts =
      "9 8 0:32 / /a rw - cgroup2 cgroup rw\n"
      "truncated line\n"
      "9 8 0:32 / /b\\040c\\134 rw master:1 propagate_from:2 - cgroup2 cgroup rw\n";
  EXPECT_EQ(find_memory_hierarchy(mounts, "0::/d e\n").directory, "/b c\\/d e");
}

TEST(MemoryHierarchy, NothingThere) {
  EXPECT_NE(find_memory_hierarchy(kV1Mounts, "3:cpu:/\n").reason.find("'memory'"),
            std::string::npos);
  EXPECT_EQ(find_memory_hierarchy("", "4:memory:/\n").reason,
            "no cgroup (v1) file system with 'memory' is mounted");
  EXPECT_EQ(find_memory_hierarchy("", "0::/\n").reason, "no cgroup2 is mounted");
}

// --- v2 on a tree of plain files -----------------------------------------------------------------

class FakeV2 : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "thor-cgroup-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
    fs::create_directories(root_ / "parent" / "own");
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const fs::path& name, const std::string& text) const {
    std::ofstream(root_ / name) << text;
  }
  [[nodiscard]] std::string read(const fs::path& name) const {
    std::ifstream file(root_ / name);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  [[nodiscard]] MemoryHierarchy at(const fs::path& own) const {
    return {CgroupVersion::kV2, root_, own.empty() ? root_ : root_ / own, {}};
  }

  fs::path root_;
};

TEST_F(FakeV2, WithoutTheControllerTheReasonNamesTheFilesOfBothChoices) {
  write("parent/own/cgroup.controllers", "cpu memory_recursive\n");
  const CgroupPool pool(at("parent/own"));
  EXPECT_EQ(pool.version(), CgroupVersion::kNone);
  EXPECT_EQ(pool.path(), "");
  EXPECT_EQ(pool.reason(), "looking for 'memory' in " + (root_ / "parent/own").string() +
                               "/cgroup.controllers: Operation not supported (errno 95); reading " +
                               (root_ / "parent").string() +
                               "/cgroup.controllers: No such file or directory (errno 2)");
}

TEST_F(FakeV2, AGroupThatRefusesLeadsToItsParentButNeverAboveTheMount) {
  for (const char* group : {"", "parent/", "parent/own/"}) {
    write(std::string(group) + "cgroup.controllers", "cpu memory\n");
    // Stands for the kernel's EBUSY: a directory cannot be written, whoever we are.
    fs::create_directory(root_ / (std::string(group) + "cgroup.subtree_control"));
  }
  const CgroupPool pool(at("parent/own"));
  EXPECT_NE(pool.reason().find("writing " + (root_ / "parent/own/cgroup.subtree_control").string()),
            std::string::npos);
  EXPECT_NE(pool.reason().find("writing " + (root_ / "parent/cgroup.subtree_control").string()),
            std::string::npos);
  const CgroupPool at_mount(at(""));
  EXPECT_EQ(at_mount.reason().find(';'), std::string::npos) << at_mount.reason();
}

TEST_F(FakeV2, WhatWasMadeBeforeAStepFailedIsRemoved) {
  write("parent/own/cgroup.controllers", "memory\n");
  write("parent/own/cgroup.subtree_control", "cpu memory\n");
  write("parent/own/cgroup.procs", "");
  const CgroupPool pool(at("parent/own"));  // plain files do not appear in its new directory
  EXPECT_EQ(pool.version(), CgroupVersion::kNone);
  EXPECT_NE(pool.reason().find("reading " + (root_ / "parent/own/thor-").string()),
            std::string::npos);
  for (const fs::directory_entry& entry : fs::directory_iterator(root_ / "parent/own")) {
    EXPECT_FALSE(entry.is_directory()) << entry.path();
  }
}

TEST_F(FakeV2, AGroupsFiles) {
  write("parent/cgroup.procs", "");
  write("parent/memory.max", "");
  write("parent/memory.swap.max", "");
  write("parent/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 9\n");
  write("parent/memory.peak", "4096\n");
  Cgroup group;
  ASSERT_FALSE(Cgroup::open(CgroupVersion::kV2, root_ / "parent", &group));
  EXPECT_FALSE(group.set_memory_limit(64 * kMiB));
  EXPECT_EQ(read("parent/memory.max"), "67108864");
  EXPECT_EQ(read("parent/memory.swap.max"), "0");
  EXPECT_EQ(group.oom_kills(), 2U);
  EXPECT_EQ(group.peak_bytes(), 4096U);
  EXPECT_FALSE(group.attach(123));
  EXPECT_EQ(read("parent/cgroup.procs"), "123");
  write("parent/cgroup.procs", "");  // or 123, whoever that is, would be killed now
}

TEST_F(FakeV2, AnOldKernelsGroupHasNeitherPeakNorSwap) {
  write("parent/cgroup.procs", "");
  write("parent/memory.max", "");
  write("parent/memory.events", "oom 3\n");
  Cgroup group;
  ASSERT_FALSE(Cgroup::open(CgroupVersion::kV2, root_ / "parent", &group));
  EXPECT_FALSE(group.set_memory_limit(kMiB));
  EXPECT_EQ(group.oom_kills(), std::nullopt);
  EXPECT_EQ(group.peak_bytes(), std::nullopt);
  EXPECT_EQ(describe(group.reset_peak()), "resetting " + (root_ / "parent/memory.peak").string() +
                                              ": Operation not supported (errno 95)");
}

// --- the kernel's own ----------------------------------------------------------------------------

// A child that waits for the word before it does its work, and dies with us.
class Child {
 public:
  explicit Child(const std::function<void()>& work) {
    int gate[2];
    if (::pipe2(gate, O_CLOEXEC) != 0) throw std::system_error(errno, std::generic_category());
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::close(gate[1]);
      char go = 0;
      if (::read(gate[0], &go, 1) == 1) work();
      ::_exit(0);
    }
    ::close(gate[0]);
    gate_.reset(gate[1]);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    wait();
  }

  [[nodiscard]] pid_t pid() const { return pid_; }
  void go() { EXPECT_EQ(::write(gate_.get(), "g", 1), 1); }
  int wait() {
    int status = -1;
    ::waitpid(std::exchange(pid_, 0), &status, 0);
    return status;
  }

 private:
  pid_t pid_ = 0;
  UniqueFd gate_;
};

// Not malloc: under a sanitizer that is another thing.
void hold(std::uint64_t bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
  if (::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kFlags, -1, 0) == MAP_FAILED) ::_exit(1);
}

// Forever, but for a signal.
void sleep_on() {
  for (;;) ::pause();
}

std::string members(const std::string& group) {
  std::ifstream file(group + "/cgroup.procs");
  return {std::istreambuf_iterator<char>(file), {}};
}

class RealCgroup : public ::testing::Test {
 protected:
  void SetUp() override {
    pool_ = std::make_unique<CgroupPool>();
    if (pool_->version() == CgroupVersion::kNone) GTEST_SKIP() << pool_->reason();
  }
  Cgroup group(const std::string& name, std::uint64_t limit = 32 * kMiB) {
    Cgroup made;
    const CgroupError created = pool_->create(name, &made);
    EXPECT_FALSE(created) << describe(created);
    const CgroupError limited = made.set_memory_limit(limit);
    EXPECT_FALSE(limited) << describe(limited);
    return made;
  }

  std::unique_ptr<CgroupPool> pool_;
};

TEST_F(RealCgroup, WhoHoldsTooMuchIsKilledAndCounted) {
  const Cgroup jail = group("jail");
  Child child([] { hold(128 * kMiB); });
  ASSERT_FALSE(jail.attach(child.pid()));
  EXPECT_EQ(members(jail.path()), std::to_string(child.pid()) + "\n");
  EXPECT_EQ(jail.oom_kills(), 0U);
  child.go();
  const int status = child.wait();
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
  EXPECT_EQ(jail.oom_kills(), 1U);
}

TEST_F(RealCgroup, TheLimitIsTheTreesNotTheProcesss) {
  const Cgroup jail = group("jail");
  Child child([] {
    for (int i = 0; i < 8; ++i) {  // 8 x 16 MiB under 32 MiB
      if (::fork() == 0) {
        hold(16 * kMiB);
        sleep_on();
      }
    }
    sleep_on();
  });
  ASSERT_FALSE(jail.attach(child.pid()));
  child.go();
  EXPECT_TRUE(holds_soon([&] { return jail.oom_kills().value_or(0) > 0; }));
  EXPECT_FALSE(jail.kill_all());
  EXPECT_EQ(members(jail.path()), "");
}

TEST_F(RealCgroup, PeakIsWhatWasHeldAndStartsAnew) {
  const Cgroup jail = group("jail", 64 * kMiB);
  if (!jail.peak_bytes()) GTEST_SKIP() << "this kernel has no memory.peak";
  Child child([] { hold(24 * kMiB); });
  ASSERT_FALSE(jail.attach(child.pid()));
  child.go();
  EXPECT_EQ(child.wait(), 0);
  EXPECT_GE(jail.peak_bytes(), 24 * kMiB);
  EXPECT_LE(jail.peak_bytes(), 64 * kMiB);
  if (const CgroupError e = jail.reset_peak()) GTEST_SKIP() << describe(e);
  EXPECT_LT(jail.peak_bytes(), 24 * kMiB);
}

TEST_F(RealCgroup, ALimitCanBeRaisedAndLowered) {
  const Cgroup jail = group("jail", 16 * kMiB);
  for (const std::uint64_t limit : {256 * kMiB, 8 * kMiB, 64 * kMiB}) {
    const CgroupError error = jail.set_memory_limit(limit);
    EXPECT_FALSE(error) << describe(error);
    const bool v1 = pool_->version() == CgroupVersion::kV1;
    std::ifstream file(jail.path() + (v1 ? "/memory.limit_in_bytes" : "/memory.max"));
    std::uint64_t now = 0;
    file >> now;
    EXPECT_EQ(now, limit);
  }
}

TEST_F(RealCgroup, KillAllReachesWhoLeftTheSession) {
  Cgroup jail = group("jail");
  Child child([] {
    if (::fork() == 0) {
      ::setsid();
      ::signal(SIGTERM, SIG_IGN);
      if (::fork() == 0) sleep_on();
      sleep_on();
    }
    sleep_on();
  });
  ASSERT_FALSE(jail.attach(child.pid()));
  child.go();
  EXPECT_TRUE(holds_soon([&] {
    const std::string pids = members(jail.path());
    return std::count(pids.begin(), pids.end(), '\n') == 3;
  }));
  EXPECT_FALSE(jail.kill_all());
  EXPECT_EQ(members(jail.path()), "");
  const std::string path = jail.path();
  EXPECT_FALSE(jail.remove());
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(RealCgroup, AGroupGoesWithItsLastOwner) {
  std::string path;
  {
    Cgroup first = group("jail");
    path = first.path();
    Cgroup second(std::move(first));
    first = Cgroup();
    EXPECT_TRUE(fs::exists(path));
    second = group("other");
    EXPECT_FALSE(fs::exists(path));
    path = second.path();
  }
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(RealCgroup, AForksCopyRemovesNothing) {
  Cgroup jail = group("jail");
  Child fork([&] {
    jail.remove();
    pool_.reset();
  });
  fork.go();
  EXPECT_EQ(fork.wait(), 0);
  EXPECT_TRUE(fs::exists(jail.path()));
}

TEST_F(RealCgroup, WhoIsGoneCannotBeAttached) {
  const Cgroup jail = group("jail");
  Child child([] {});
  const pid_t gone = child.pid();
  child.go();
  child.wait();
  const CgroupError error = jail.attach(gone);
  EXPECT_EQ(describe(error), "writing " + jail.path() + "/cgroup.procs: No such process (errno 3)");
}

TEST_F(RealCgroup, AWriterOfZeroAttachesItself) {
  const Cgroup jail = group("jail");
  Child child([&] {
    if (::write(jail.procs_fd(), "0", 1) != 1) ::_exit(errno);
    sleep_on();
  });
  child.go();
  EXPECT_TRUE(
      holds_soon([&] { return members(jail.path()) == std::to_string(child.pid()) + "\n"; }));
}

TEST_F(RealCgroup, ThePoolsEndKillsWhatWasForgotten) {
  const std::string path = pool_->path();
  Cgroup forgotten = group("forgotten");
  Child child([] { sleep_on(); });
  ASSERT_FALSE(forgotten.attach(child.pid()));
  pool_.reset();
  EXPECT_FALSE(fs::exists(path));
  EXPECT_EQ(child.wait(), SIGKILL);
}

TEST_F(RealCgroup, PoolsOfTheDeadAreRemovedThoseOfTheLivingAreNot) {
  // A place of our own: what runs at the same time would clean up, too.
  const fs::path parent = pool_->path() + "/nested";
  ASSERT_TRUE(fs::create_directory(parent));
  const MemoryHierarchy nested{pool_->version(), pool_->path(), parent, {}};
  const CgroupPool living(nested);
  ASSERT_EQ(living.reason(), "");
  struct stat info{};
  ASSERT_EQ(::stat("/proc/self/ns/pid", &info), 0);
  const std::string here = "thor-" + std::to_string(info.st_ino) + "-";
  Child dead([] {});
  const std::string gone = std::to_string(dead.pid());
  dead.go();
  dead.wait();
  // By a dead process, by an earlier one with our pid, by one of a pid namespace we cannot judge.
  const fs::path of_dead = parent / (here + gone + "-1-0");
  const fs::path of_earlier = parent / (here + std::to_string(::getpid()) + "-1-0");
  const fs::path of_foreign = parent / ("thor-1-" + gone + "-1-0");
  const fs::path of_nobody = parent / (here + gone + "-1-0x");
  for (const fs::path& pool : {of_dead, of_earlier, of_foreign, of_nobody}) {
    ASSERT_TRUE(fs::create_directory(pool)) << pool;
  }
  ASSERT_TRUE(fs::create_directory(of_dead / "jail"));
  Child orphan([] { sleep_on(); });
  std::ofstream(of_dead / "jail" / "cgroup.procs") << orphan.pid() << std::flush;
  ASSERT_EQ(members(of_dead / "jail"), std::to_string(orphan.pid()) + "\n");

  const CgroupPool next(nested);
  EXPECT_EQ(next.reason(), "");
  EXPECT_FALSE(fs::exists(of_dead));
  EXPECT_EQ(orphan.wait(), SIGKILL);
  EXPECT_FALSE(fs::exists(of_earlier));
  EXPECT_TRUE(fs::exists(of_foreign));
  EXPECT_TRUE(fs::exists(of_nobody));
  EXPECT_TRUE(fs::exists(living.path()));
}

TEST_F(RealCgroup, AKeeperRemovesTheTreeOfAKilledOwner) {
  int report[2];
  ASSERT_EQ(::pipe2(report, O_CLOEXEC), 0);
  Child owner([&] {
    const CgroupPool pool;
    Cgroup jail;
    if (pool.create("jail", &jail) || jail.attach(::getpid())) ::_exit(1);
    if (::write(report[1], pool.path().data(), pool.path().size()) < 0) ::_exit(2);
    sleep_on();
  });
  owner.go();
  ::close(report[1]);
  std::string path(4096, '\0');
  path.resize(static_cast<std::size_t>(std::max<ssize_t>(0, ::read(report[0], path.data(), 4096))));
  ::close(report[0]);
  ASSERT_TRUE(fs::exists(path)) << path;
  ::kill(owner.pid(), SIGSTOP);  // as good as any state to find it in
  const CgroupError error = remove_cgroup_tree(path);
  EXPECT_FALSE(error) << describe(error);
  EXPECT_FALSE(fs::exists(path));
  EXPECT_EQ(owner.wait(), SIGKILL);
  EXPECT_FALSE(remove_cgroup_tree(path));  // again
}

}  // namespace
}  // namespace thor
