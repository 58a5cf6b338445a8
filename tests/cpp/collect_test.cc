#include "core/collect.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <string>
#include <vector>

#include "core/handover.h"
#include "stub_sandbox.h"

namespace thor {
namespace {

using Files = std::map<std::string, std::string>;

TEST(Collect, RegularFilesBelowTheWorkingDirectoryAndNothingElse) {
  Orchestrator orchestrator(stub_config(1));
  Request request = command("litter");
  request.collect = {"file",
                     "link",
                     "linked-directory/er/file",
                     "deep",
                     "deep/er/file",
                     "pipe",
                     "large",
                     "../work/file",
                     "missing",
                     "missing/file",
                     "./deep//er/file",
                     "file/",
                     "empty",
                     "private",
                     "/file"};
  const Result result = run_one(orchestrator, request);
  EXPECT_EQ(result.status, Status::kOk) << result.error;
  EXPECT_EQ(result.files.at("file"), "y");
  EXPECT_EQ(result.files.at("deep/er/file"), "x");
  EXPECT_EQ(result.files.at("./deep//er/file"), "x");
  EXPECT_EQ(result.files.at("empty"), "");
  EXPECT_EQ(result.files.at("/file"), "y") << "from the working directory";
  for (const char* none : {"link", "linked-directory/er/file", "deep", "pipe", "large",
                           "../work/file", "missing", "missing/file", "file/"}) {
    EXPECT_FALSE(result.files.contains(none)) << none;
  }
}

TEST(Collect, AlsoFromSnippetsThatFailOrAreKilled) {
  Orchestrator orchestrator(stub_config(1));
  for (const char* ending : {"exit 1", "abort", "spin"}) {
    const std::uint64_t dialogue = orchestrator.open_dialogue(
        {.payload = "talk", .stdin_data = {}, .limits = {}, .collect = {"mine"}});
    ask(orchestrator, dialogue, "write mine kept");
    const Result result =
        ask(orchestrator, dialogue, std::string(ending) == "exit 1" ? "leave" : ending,
            milliseconds(std::string(ending) == "spin" ? 300 : 20'000));
    EXPECT_EQ(result.files, (Files{{"mine", "kept"}})) << ending;
    orchestrator.close_dialogue(dialogue);
  }
}

std::vector<UniqueFd> files(const std::vector<std::string>& contents) {
  std::vector<UniqueFd> out;
  for (const std::string& text : contents) out.push_back(input_file(text));
  return out;
}

TEST(ReadCollected, BitsSayWhichPathsTheDescriptorsAre) {
  EXPECT_EQ(read_collected({"a", "b", "c"}, 0b101, files({"1", "3"})),
            (Files{{"a", "1"}, {"c", "3"}}));
  EXPECT_TRUE(read_collected({"a"}, 0, {}).empty());
}

TEST(ReadCollected, BitsWithoutDescriptorsAndDescriptorsWithoutBits) {
  EXPECT_EQ(read_collected({"a", "b"}, 0b11, files({"1"})), (Files{{"a", "1"}}));
  EXPECT_TRUE(read_collected(std::vector<std::string>(100, "a"), 0, files({"1"})).empty());
}

TEST(ReadCollected, WhatDoesNotFitIsLeftOutAndSmallerOnesStillFit) {
  const std::string half(kMaxCollectedSize / 2, 'x');
  const std::map<std::string, std::string> got =
      read_collected({"a", "b", "c", "d"}, 0b1111, files({half, half + "y", half, ""}));
  EXPECT_EQ(got, (Files{{"a", half}, {"c", half}, {"d", ""}}));
}

}  // namespace
}  // namespace thor
