// What starts, what does not, and what is said about it.
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "stub_sandbox.h"

namespace thor {
namespace {

OrchestratorConfig with(const std::string& variable) {
  OrchestratorConfig config = stub_config(1, {"bare", "second", "third"});
  config.env.push_back(variable);
  return config;
}

Result in_tier(Orchestrator& orchestrator, std::uint32_t tier) {
  Request request = command("print here");
  request.tier = tier;
  return run_one(orchestrator, request);
}

TEST(Start, ATemplatesWordsAreInTheError) {
  EXPECT_EQ(start_error(with("STUB_REFUSE=bare")),
            "the sandbox's template 'bare' did not start: stub refuses to start\n");
}

TEST(Start, ProgramsThatAreNotThere) {
  OrchestratorConfig config = stub_config();
  config.tiers[0].argv = {"/nonexistent/interpreter"};
  EXPECT_NE(start_error(config).find("starting /nonexistent/interpreter: No such file"),
            std::string::npos);
}

TEST(Start, CpusThatAreNotThere) {
  OrchestratorConfig config = stub_config();
  for (const int cpu : {-1, 1023, 1 << 20}) {
    config.cpus = {cpu};
    EXPECT_NE(start_error(config).find("sched_setaffinity: Invalid argument"), std::string::npos);
  }
}

TEST(Start, ConfigurationsThatCannotBe) {
  OrchestratorConfig config = stub_config();
  config.slots = 0;
  EXPECT_EQ(start_error(config), "slots is 0, expected at least 1");
  config = stub_config();
  config.tiers[0].argv = {};
  EXPECT_EQ(start_error(config), "argv of tier 'bare' is empty, expected an interpreter");
  config.tiers = {};
  EXPECT_EQ(start_error(config), "there are 0 tiers, expected 1 to 64");
}

// The template forks: with a second thread its children could find any lock held for ever.
TEST(Start, ATemplateWithThreadsIsRefused) {
  EXPECT_EQ(start_error(with("STUB_THREAD=1")),
            "the sandbox's template 'bare' did not start: checking that the template has one "
            "thread [2]: Device or resource busy (errno 16)");
}

TEST(Start, AStepInsideTheJailIsNamedWithItsErrnoAndIndex) {
  const std::string error = start_error(with("STUB_READONLY=/nonexistent/library"));
  EXPECT_NE(error.find("bind-mounting a read-only path ["), std::string::npos) << error;
  EXPECT_NE(error.find("]: No such file or directory (errno 2)"), std::string::npos) << error;
}

TEST(Start, ATemplateThatSaysNothingIsGivenUp) {
  OrchestratorConfig config = stub_config();
  config.tiers[0].argv = {"/bin/sleep", "1000"};
  config.startup_timeout = milliseconds(100);
  EXPECT_EQ(start_error(config), "the sandbox's template 'bare' was not ready after 100 ms");
}

TEST(Start, ATierThatCannotStartIsReplacedByALighterOne) {
  Orchestrator orchestrator(with("STUB_REFUSE=third"));
  const Result result = in_tier(orchestrator, 2);  // the second, which nobody has asked for yet
  EXPECT_EQ(result.status, Status::kOk) << result.error;
  EXPECT_EQ(result.stdout_data, "here");
}

TEST(Start, OneTierAfterAnotherIsReplaced) {
  Orchestrator orchestrator(with("STUB_REFUSE=second third"));
  for (int i = 0; i < 2; ++i) {
    const Result result = in_tier(orchestrator, 2);
    EXPECT_EQ(result.status, Status::kOk) << result.error;
  }
}

TEST(Start, ATierThatHangsIsReplacedToo) {
  OrchestratorConfig config = with("STUB_HANG=second");
  config.startup_timeout = std::chrono::seconds(5);  // the first tier's and its jail's, too
  config.tiers.pop_back();
  Orchestrator orchestrator(config);
  auto sink = std::make_shared<CompletionQueue>();
  Request request = command("print x");
  request.tier = 1;
  orchestrator.submit(request, sink);
  expect_healthy(orchestrator);
  EXPECT_EQ(await(*sink, 1).at(0).result.stdout_data, "x");
}

TEST(Start, ClosingWhileATierStarts) {
  Orchestrator orchestrator(with("STUB_HANG=second"));
  auto sink = std::make_shared<CompletionQueue>();
  Request request = command("print x");
  request.tier = 1;
  orchestrator.submit(request, sink);
  EXPECT_TRUE(holds_soon([&] { return orchestrator.stats().counts.template_starts == 2; }));
  orchestrator.close();
  EXPECT_EQ(await(*sink, 1).at(0).result.error, "the sandbox was closed");
}

TEST(Start, AZygoteThatDiesAtOnceIsSaid) {
  EXPECT_EQ(start_error(with("STUB_REFRESH=die")), "the snippet's jail died");
}

TEST(Start, AJailThatSpeaksOutOfTurnIsGivenUp) {
  EXPECT_EQ(start_error(with("STUB_REFRESH=end-early")),
            "a jail sent message 6 with 0 descriptors, expected that a child is parked (4, with "
            "3)");
  EXPECT_EQ(start_error(with("STUB_REFRESH=babble")), "the snippet's jail died");
  EXPECT_EQ(start_error(with("STUB_REFRESH=unlikely-flags")), "the snippet's jail died");
}

// Its request would run a second time.
TEST(Start, AJailThatParksTwiceServesNobody) {
  const std::string expected =
      "a jail sent message 4 with 3 descriptors, expected that its child ended (6)";
  try {
    Orchestrator orchestrator(with("STUB_REFRESH=park-twice"));
    const Result result = run_one(orchestrator, command("print x"));
    EXPECT_EQ(result.status, Status::kInfra);
    EXPECT_EQ(result.error, expected);
  } catch (const StartError& e) {  // both were there before anybody could ask
    EXPECT_EQ(e.what(), expected);
  }
}

TEST(Start, PipesThatMakeReadersWaitDoNotStopTheOrchestrator) {
  Orchestrator orchestrator(with("STUB_REFRESH=pipes-that-wait"));
  const Result result = run_one(orchestrator, command("print x", milliseconds(100)));
  EXPECT_EQ(result.status, Status::kTimeout) << result.error;
}

}  // namespace
}  // namespace thor
