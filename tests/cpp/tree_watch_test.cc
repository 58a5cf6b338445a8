#include "core/tree_watch.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>

namespace thor {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// A child that holds memory of its own until it is killed.
pid_t holder(std::uint64_t bytes, int sharing) {
  const pid_t child = ::fork();
  if (child != 0) return child;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  const void* held =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (held == MAP_FAILED) ::_exit(1);
  ::raise(SIGSTOP);
  ::_exit(0);
}

void end(pid_t child) {
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST(TreeWatch, CountsWhatAProcessHoldsSharedOrNot) {
  for (const int sharing : {MAP_PRIVATE, MAP_SHARED}) {
    const pid_t none = holder(4'096, sharing);
    const pid_t much = holder(64 * kMiB, sharing);
    int status = 0;
    ASSERT_EQ(::waitpid(none, &status, WUNTRACED), none);
    ASSERT_EQ(::waitpid(much, &status, WUNTRACED), much);
    const std::uint64_t more = private_memory_bytes(much) - private_memory_bytes(none);
    EXPECT_GE(more, 63 * kMiB);
    EXPECT_LE(more, 66 * kMiB) << "with its page tables";
    end(none);
    end(much);
  }
}

TEST(TreeWatch, WhoIsGoneHoldsNothing) {
  const pid_t gone = holder(kMiB, MAP_PRIVATE);
  end(gone);
  EXPECT_EQ(private_memory_bytes(gone), 0U);
}

// In a pid namespace of its own, so that only our processes are seen.
int tree_of_three() {
  if (::mount("proc", "/proc", "proc", 0, nullptr) != 0) return 77;
  const std::uint64_t baseline = private_memory_bytes(1);
  if (tree_memory_bytes(0) != 0) return 1;  // nobody but pid 1
  for (int i = 0; i < 3; ++i) ::waitpid(holder(16 * kMiB, MAP_PRIVATE), nullptr, WUNTRACED);
  const std::uint64_t all = tree_memory_bytes(0);
  const std::uint64_t above = tree_memory_bytes(baseline);
  ::kill(-1, SIGKILL);
  if (all < 48 * kMiB) return 2;
  if (above < 40 * kMiB || above > 60 * kMiB) return 3;
  return tree_memory_bytes(1'000 * kMiB) == 0 ? 0 : 4;  // less than the baseline is no negative
}

TEST(TreeWatch, AddsUpATreeAboveItsBaseline) {
  const pid_t outer = ::fork();
  if (outer == 0) {
    if (::unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID) != 0) ::_exit(77);
    const pid_t first = ::fork();
    if (first == 0) ::_exit(tree_of_three());
    int status = 0;
    ::waitpid(first, &status, 0);
    ::_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 99);
  }
  int status = 0;
  ::waitpid(outer, &status, 0);
  if (WEXITSTATUS(status) == 77) GTEST_SKIP() << "no user namespaces";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace thor
