// Rules about the sources that no compiler checks.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <string>

namespace {

namespace fs = std::filesystem;

std::set<std::string> files_with(const std::regex& pattern) {
  std::set<std::string> found;
  for (const auto& entry : fs::recursive_directory_iterator(THOR_SOURCES)) {
    if (entry.path().extension() != ".cc" && entry.path().extension() != ".h") continue;
    std::ifstream file(entry.path());
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    if (std::regex_search(text, pattern)) {
      found.insert(fs::relative(entry.path(), THOR_SOURCES).string());
    }
  }
  return found;
}

// The host's process has threads, and allocates in them: between a fork and an exec nothing of ours
// could run safely there. Whoever forks has one thread, and makes sure (template.cc, probe.cc).
TEST(Sources, OnlySingleThreadedProcessesFork) {
  const std::set<std::string> expected{"core/jail.cc", "core/probe.cc", "core/zygote.cc",
                                       "util/pidfd.cc", "util/pidfd.h"};
  EXPECT_EQ(files_with(std::regex(R"(\b(v?fork|clone3?|fork_into|kSysClone3)\()")), expected);
}

TEST(Sources, WhoeverForksCountsItsThreads) {
  const std::set<std::string> counting = files_with(std::regex("/proc/self/task"));
  EXPECT_TRUE(counting.contains("core/template.cc"));
  EXPECT_TRUE(counting.contains("core/probe.cc"));
}

}  // namespace
