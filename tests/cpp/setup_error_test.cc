#include "core/setup_error.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>

namespace thor {
namespace {

TEST(SetupError, NamesStepErrnoAndIndex) {
  const std::string text = describe({SetupStep::kBind, EPERM, 3});
  EXPECT_EQ(text, "bind-mounting a read-only path [3]: Operation not permitted (errno 1)");
}

TEST(SetupError, NoneIsFalse) { EXPECT_FALSE(SetupError{}); }

TEST(SetupError, EveryStepHasItsOwnName) {
  std::set<std::string> names;
  int steps = 0;
  for (int step = 0; step <= static_cast<int>(SetupStep::kPayload); ++step, ++steps) {
    names.insert(describe({static_cast<SetupStep>(step), 0, 0}));
  }
  EXPECT_EQ(names.size(), static_cast<std::size_t>(steps));
}

}  // namespace
}  // namespace thor
