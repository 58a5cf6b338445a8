#include "core/pristine.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/id_maps.h"

namespace thor {
namespace {

namespace fs = std::filesystem;

constexpr int kNoMount = 77;

// Exit code of a child in which an empty private tmpfs, unseen by others, is at /tmp.
int in_private_tmpfs(const std::function<int()>& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    const IdMap own{0, ::geteuid(), ::getegid()};
    if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0 || write_id_maps("/proc/self", {own}) ||
        ::mount("tmpfs", "/tmp", "tmpfs", MS_NOATIME, "size=1m") != 0) {
      ::_exit(kNoMount);
    }
    ::_exit(work());
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool make(const char* path) {
  return static_cast<bool>(UniqueFd(::open(path, O_WRONLY | O_CREAT | O_CLOEXEC, S_IRUSR)));
}

// 1: it saw that `change` did something; 0: it did not. The change must work.
int sees(const std::function<bool()>& change, const std::function<bool()>& before = {}) {
  return in_private_tmpfs([&] {
    std::vector<PristineDirectory> all;
    if (before && !before()) return 3;
    if (PristineDirectory::remember("/tmp", &all) || !all.at(0).untouched()) return 2;
    if (!change()) return 3;
    return all.at(0).untouched() ? 0 : 1;
  });
}

class Pristine : public testing::Test {
 protected:
  void SetUp() override {
    if (in_private_tmpfs([] { return 0; }) == kNoMount) GTEST_SKIP() << "no user namespaces";
  }
};

TEST_F(Pristine, LookingLeavesNoTrace) {
  EXPECT_EQ(sees([] { return fs::directory_iterator("/tmp") == fs::directory_iterator(); }), 0);
  EXPECT_EQ(sees([] {
              struct stat info{};
              return ::stat("/tmp", &info) == 0 && ::access("/tmp/none", F_OK) != 0;
            }),
            0);
  EXPECT_EQ(sees([] { return UniqueFd(::open("/tmp/file", O_RDONLY | O_CLOEXEC)).get() >= 0; },
                 [] { return make("/tmp/file"); }),
            0);
}

TEST_F(Pristine, FilesThatWereThereForAMoment) {
  EXPECT_EQ(sees([] { return make("/tmp/a"); }), 1);
  EXPECT_EQ(sees([] { return make("/tmp/a") && ::unlink("/tmp/a") == 0; }), 1);
  EXPECT_EQ(sees([] { return ::mkdir("/tmp/a", 0700) == 0 && ::rmdir("/tmp/a") == 0; }), 1);
  EXPECT_EQ(sees([] { return ::symlink("x", "/tmp/a") == 0 && ::unlink("/tmp/a") == 0; }), 1);
}

TEST_F(Pristine, RenamingThereAndBack) {
  const auto there_and_back = [] {
    return ::rename("/tmp/a", "/tmp/b") == 0 && ::rename("/tmp/b", "/tmp/a") == 0;
  };
  EXPECT_EQ(sees(there_and_back, [] { return make("/tmp/a"); }), 1);
}

TEST_F(Pristine, ModeAndTimes) {
  EXPECT_EQ(sees([] { return ::chmod("/tmp", 0711) == 0; }), 1);
  EXPECT_EQ(sees([] { return ::utimensat(AT_FDCWD, "/tmp", nullptr, 0) == 0; }), 1);
}

// Its owner can set the times back, but not the time of that change. The kernel's clock for files
// ticks every 10 ms at the slowest.
TEST_F(Pristine, TimesThatWereSetBack) {
  EXPECT_EQ(sees([] {
              ::usleep(50'000);
              const std::array<timespec, 2> epoch{};
              return make("/tmp/a") && ::unlink("/tmp/a") == 0 &&
                     ::utimensat(AT_FDCWD, "/tmp", epoch.data(), 0) == 0;
            }),
            1);
}

TEST_F(Pristine, WhatFillsTheFileSystemFromElsewhere) {
  EXPECT_EQ(sees(
                [] {
                  const UniqueFd file(::open("/tmp/deep/file", O_WRONLY | O_CLOEXEC));
                  return ::write(file.get(), "x", 1) == 1;
                },
                [] {
                  return ::mkdir("/tmp/deep", 0700) == 0 && ::chmod("/tmp/deep", 0700) == 0 &&
                         static_cast<bool>(UniqueFd(
                             ::open("/tmp/deep/file", O_WRONLY | O_CREAT | O_CLOEXEC, 0600)));
                }),
            1);
}

TEST(PristineDirectory, WhatCannotBeRememberedIsNamed) {
  std::vector<PristineDirectory> all;
  const SetupError error = PristineDirectory::remember("/nonexistent/directory", &all);
  EXPECT_EQ(describe(error),
            "remembering a writable directory [0]: No such file or directory (errno 2)");
  EXPECT_TRUE(all.empty());
}

}  // namespace
}  // namespace thor
