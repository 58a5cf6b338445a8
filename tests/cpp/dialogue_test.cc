// Dialogues: one process that is asked several things.
#include <gtest/gtest.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "stub_sandbox.h"

namespace thor {
namespace {

Request opening(milliseconds life = std::chrono::hours(1)) {
  Request request{.payload = "talk"};
  request.life = life;
  request.limits.max_output_bytes = 1'000;
  return request;
}

TEST(Dialogue, StepsAreAnsweredInOrder) {
  Orchestrator orchestrator(stub_config());
  const std::uint64_t dialogue = orchestrator.open_dialogue(opening());
  auto sink = std::make_shared<CompletionQueue>();
  std::vector<std::uint64_t> tickets;
  for (int i = 0; i < 20; ++i) {
    tickets.push_back(
        orchestrator.step(dialogue, "say " + std::to_string(i), command("").limits, 0, sink));
  }
  const std::vector<Completion> done = await(*sink, tickets.size());
  for (std::size_t i = 0; i < done.size(); ++i) {
    EXPECT_EQ(done[i].ticket, tickets[i]);
    EXPECT_EQ(done[i].result.reply, std::to_string(i));
  }
  EXPECT_EQ(ask(orchestrator, dialogue, "fds").stdout_data, "0 1 2 3 4 ") << "4: the step";
  EXPECT_EQ(ask(orchestrator, dialogue, "write state 1").reply, "0");
  EXPECT_EQ(ask(orchestrator, dialogue, "write state 1").reply, "0") << "its files are still there";
}

TEST(Dialogue, AProcessThatEndsInAStepEndsTheDialogue) {
  Orchestrator orchestrator(stub_config());
  for (const auto& [step, status] :
       std::vector<std::pair<std::string, Status>>{{"leave", Status::kError},
                                                   {"abort", Status::kError},
                                                   {"spin", Status::kTimeout},
                                                   {"flood 1000000", Status::kOutput},
                                                   {"hang-up", Status::kTimeout}}) {
    const bool never_ends = status == Status::kTimeout;
    const std::uint64_t dialogue = orchestrator.open_dialogue(opening());
    EXPECT_EQ(ask(orchestrator, dialogue, "say hi").reply, "hi");
    auto sink = std::make_shared<CompletionQueue>();
    const Limits limits = command("", milliseconds(never_ends ? 300 : 20'000)).limits;
    orchestrator.step(dialogue, step, limits, 0, sink);
    orchestrator.step(dialogue, "say never", limits, 0, sink);
    const std::vector<Completion> done = await(*sink, 2);
    EXPECT_EQ(done[0].result.status, status) << step << ": " << done[0].result.error;
    EXPECT_EQ(done[1].result.status, Status::kInfra);
    EXPECT_EQ(ask(orchestrator, dialogue, "say late").status, Status::kInfra);
    orchestrator.close_dialogue(dialogue);
    expect_healthy(orchestrator);
  }
}

TEST(Dialogue, OutputAccumulatesWhereAsked) {
  Orchestrator orchestrator(stub_config());
  Request request = opening();
  request.accumulate = true;
  const std::uint64_t dialogue = orchestrator.open_dialogue(request);
  EXPECT_EQ(ask(orchestrator, dialogue, "print one").stdout_data, "");
  EXPECT_EQ(ask(orchestrator, dialogue, "print two").stdout_data, "");
  const Result last = ask(orchestrator, dialogue, "leave");
  EXPECT_EQ(last.stdout_data, "onetwo");
  EXPECT_EQ(last.exit_code, 7);
}

TEST(Dialogue, ALifeThatIsOverIsSaid) {
  Orchestrator orchestrator(stub_config());
  const std::uint64_t dialogue = orchestrator.open_dialogue(opening(milliseconds(50)));
  EXPECT_EQ(ask(orchestrator, dialogue, "say hi").reply, "hi");
  Result result;
  EXPECT_TRUE(holds_soon([&] {
    result = ask(orchestrator, dialogue, "say hi");
    return result.status == Status::kInfra;
  }));
  EXPECT_EQ(result.error, "the dialogue is over: its life is over");
}

TEST(Dialogue, RepliesNobodyAskedForAreNotTheNextSteps) {
  Orchestrator orchestrator(stub_config());
  const std::uint64_t dialogue = orchestrator.open_dialogue(opening());
  EXPECT_EQ(ask(orchestrator, dialogue, "chatter 1").reply, "more");
  // "chattered" is on its way, unasked: its sender no longer follows the protocol.
  EXPECT_TRUE(holds_soon([&] { return orchestrator.stats().counts.jails == 0; }));
  EXPECT_EQ(ask(orchestrator, dialogue, "say hi").error,
            "the dialogue is over: it spoke without being asked");
}

TEST(Dialogue, AWaitingStepCanBeCancelled) {
  Orchestrator orchestrator(stub_config());
  const std::uint64_t dialogue = orchestrator.open_dialogue(opening());
  EXPECT_EQ(ask(orchestrator, dialogue, "say hi").reply, "hi");
  auto sink = std::make_shared<CompletionQueue>();
  const Limits limits = command("").limits;
  const std::uint64_t first = orchestrator.step(dialogue, "sleep-ignoring-term", limits, 0, sink);
  const std::uint64_t second = orchestrator.step(dialogue, "say x", limits, 0, sink);
  EXPECT_TRUE(holds_soon([&] { return orchestrator.stats().queued == 0; }));
  orchestrator.cancel(second);
  const std::vector<Completion> waited = await(*sink, 1);
  EXPECT_EQ(waited.at(0).ticket, second);
  EXPECT_EQ(waited.at(0).result.error, "cancelled by the caller");
  orchestrator.cancel(first);
  EXPECT_EQ(await(*sink, 1).at(0).result.error, "cancelled by the caller");
}

// Whatever a step is doing when its dialogue is closed: queued, its jail being made, running.
TEST(Dialogue, ClosedAtAnyMomentLeavesNoJailBehind) {
  Orchestrator orchestrator(stub_config(1));
  auto sink = std::make_shared<CompletionQueue>();
  std::size_t steps = 0;
  for (int round = 0; round < 200; ++round) {
    const std::uint64_t dialogue = orchestrator.open_dialogue(opening());
    for (int i = 0; i < 1 + round % 3; ++i, ++steps) {
      orchestrator.step(dialogue, round % 2 == 0 ? "say x" : "spin", command("").limits, 0, sink);
    }
    for (int pause = round % 50 * 100; pause > 0; --pause) static_cast<void>(::getppid());
    orchestrator.close_dialogue(dialogue);
    EXPECT_THROW(orchestrator.step(dialogue, "say y", command("").limits, 0, sink),
                 std::logic_error);
  }
  await(*sink, steps);
  expect_healthy(orchestrator);
  EXPECT_LE(orchestrator.stats().counts.jails, 2U);
  EXPECT_EQ(orchestrator.stats().dialogues, 0U);
}

// Those that end leave their jails to snippets; those must not use up the room.
TEST(Dialogue, ManyOneAfterAnotherInEveryTier) {
  OrchestratorConfig config = stub_config(1, {"bare", "second"});
  Orchestrator orchestrator(config);
  for (int round = 0; round < 6; ++round) {
    std::vector<std::uint64_t> open;
    const auto tier = static_cast<std::uint32_t>(round % 2);
    for (std::uint32_t i = 0; i < config.max_dialogues; ++i) {
      open.push_back(orchestrator.open_dialogue(opening()));
      EXPECT_EQ(ask(orchestrator, open.back(), "say x", milliseconds(20'000), tier).reply, "x");
    }
    EXPECT_THROW(orchestrator.open_dialogue(opening()), QueueFull);
    for (const std::uint64_t dialogue : open) {  // half of them with traces
      if (dialogue % 2 == 0) ask(orchestrator, dialogue, "write a b", milliseconds(20'000), tier);
      EXPECT_EQ(ask(orchestrator, dialogue, "leave", milliseconds(20'000), tier).exit_code, 7);
      orchestrator.close_dialogue(dialogue);
    }
    expect_healthy(orchestrator, tier);
    EXPECT_LE(orchestrator.stats().counts.jails, 1U * 2 + config.max_dialogues);
  }
}

}  // namespace
}  // namespace thor
