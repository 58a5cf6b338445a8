// The orchestrator against a real template: real namespaces, real clocks, no interpreter.
#include "thor/orchestrator.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/cgroup.h"
#include "stub_sandbox.h"

namespace thor {
namespace {

TEST(Orchestrator, StatusesAndTheNextSnippet) {
  Orchestrator orchestrator(stub_config());
  const std::vector<std::pair<std::string, Status>> cases{{"print hello", Status::kOk},
                                                          {"exit 0", Status::kOk},
                                                          {"exit 3", Status::kError},
                                                          {"abort", Status::kError},
                                                          {"oom", Status::kMemory},
                                                          {"orphans 5", Status::kOk},
                                                          {"syscall-mount", Status::kOk},
                                                          {"flood 5000", Status::kOutput},
                                                          {"flood 100000000", Status::kOutput},
                                                          {"flood-by-two", Status::kOutput},
                                                          {"write left here", Status::kOk},
                                                          {"touch-and-remove", Status::kOk},
                                                          {"open-many", Status::kOk},
                                                          {"close-output", Status::kOk},
                                                          {"signal 31", Status::kKilled},
                                                          {"signal 11", Status::kError}};
  for (const auto& [payload, status] : cases) {
    const Result result = run_one(orchestrator, command(payload));
    EXPECT_EQ(result.status, status) << payload << ": " << result.error;
    expect_healthy(orchestrator);
  }
}

TEST(Orchestrator, TimeLimitsKillAndKeepAccounts) {
  Orchestrator orchestrator(stub_config());
  // Long enough for any machine to start it: what never ran is no timeout.
  constexpr milliseconds kShort(1'000);
  const Result result = run_one(orchestrator, command("spin", kShort));
  EXPECT_EQ(result.status, Status::kTimeout);
  EXPECT_GE(result.wall, kShort);
  EXPECT_GT(result.cpu.count(), 0);
  Request greedy = command("spin", milliseconds(60'000));
  greedy.limits.cpu = std::chrono::seconds(1);
  EXPECT_EQ(run_one(orchestrator, greedy).status, Status::kTimeout);
  const Result stubborn = run_one(orchestrator, command("sleep-ignoring-term", kShort));
  EXPECT_EQ(stubborn.status, Status::kTimeout);
  expect_healthy(orchestrator);
}

TEST(Orchestrator, EachSnippetIsPidTwoAndHasThreeDescriptors) {
  Orchestrator orchestrator(stub_config());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(run_one(orchestrator, command("getpid")).stdout_data, "2 1000");
    EXPECT_EQ(run_one(orchestrator, command("fds")).stdout_data, "0 1 2 ");
  }
  EXPECT_EQ(orchestrator.stats().counts.jails_made, 1U) << "nothing was left, so one jail will do";
}

TEST(Orchestrator, AJailWithTracesIsNotUsedAgain) {
  Orchestrator orchestrator(stub_config(1));
  EXPECT_EQ(run_one(orchestrator, command("write mine 1")).status, Status::kOk);
  Request again = command("print x");
  again.collect = {"mine"};
  EXPECT_TRUE(run_one(orchestrator, again).files.empty());
  EXPECT_EQ(run_one(orchestrator, command("touch-and-remove")).status, Status::kOk);
  expect_healthy(orchestrator);
  EXPECT_EQ(orchestrator.stats().counts.jails_discarded, 2U);
  EXPECT_EQ(orchestrator.stats().counts.jails_made, 3U);
}

TEST(Orchestrator, StdinAndLongPayloadsArriveWhole) {
  Orchestrator orchestrator(stub_config());
  Request request = command("echo-stdin");
  request.stdin_data = std::string("a\0b\n", 4);
  EXPECT_EQ(run_one(orchestrator, request).stdout_data, request.stdin_data);
  for (const std::size_t size : {32'760UL, 32'768UL, 32'769UL, 3'000'000UL}) {
    Request longer = command("print " + std::string(size - 6, 'y'));
    longer.limits.max_output_bytes = 4'000'000;
    EXPECT_EQ(run_one(orchestrator, longer).stdout_data.size(), size - 6);
  }
}

TEST(Orchestrator, ManyThreadsSubmitAndEachGetsItsOwn) {
  Orchestrator orchestrator(stub_config());
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&orchestrator, t] {
      std::vector<Request> requests;
      for (int i = 0; i < 25; ++i) {
        requests.push_back(command("print " + std::to_string(t * 100 + i)));
      }
      const std::vector<Result> results = run_all(orchestrator, requests);
      for (int i = 0; i < 25; ++i) {
        EXPECT_EQ(results[static_cast<std::size_t>(i)].stdout_data, std::to_string(t * 100 + i));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(orchestrator.stats().completed, 100U);
  EXPECT_EQ(orchestrator.stats().counts.running, 0U);
}

TEST(Orchestrator, HigherPrioritiesFirst) {
  OrchestratorConfig one_at_a_time = stub_config(1);
  one_at_a_time.slot_keeping = std::chrono::hours(1);
  Orchestrator orchestrator(one_at_a_time);
  auto sink = std::make_shared<CompletionQueue>();
  Request first = command("spin");
  first.priority = 3;  // whether or not it runs by then, it is in the others' way
  const std::uint64_t blocker = orchestrator.submit(first, sink);
  std::vector<std::uint64_t> expected(3);
  for (const std::int32_t priority : {0, 2, 1}) {
    Request request = command("exit 0");
    request.priority = priority;
    expected[static_cast<std::size_t>(2 - priority)] = orchestrator.submit(request, sink);
  }
  orchestrator.cancel(blocker);
  const std::vector<Completion> done = await(*sink, 4);
  EXPECT_EQ(done.at(0).ticket, blocker);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(done.at(i + 1).ticket, expected[i]);
}

TEST(Orchestrator, EndlessLoopsDoNotStopTheOthers) {
  Orchestrator orchestrator(stub_config(1));
  auto sink = std::make_shared<CompletionQueue>();
  const std::uint64_t endless = orchestrator.submit(command("spin"), sink);
  const std::uint64_t quick = orchestrator.submit(command("print x"), sink);
  const std::vector<Completion> first = await(*sink, 1);
  EXPECT_EQ(first.at(0).ticket, quick);
  EXPECT_EQ(first.at(0).result.stdout_data, "x");
  orchestrator.cancel(endless);
  EXPECT_EQ(await(*sink, 1).at(0).ticket, endless);
}

// As many as there are slots run beside the others; one more keeps its slot however long it runs.
TEST(Orchestrator, NotMoreThanTwiceTheSlotsRun) {
  Orchestrator orchestrator(stub_config(1));
  auto sink = std::make_shared<CompletionQueue>();
  const std::uint64_t first = orchestrator.submit(command("spin"), sink);
  const std::uint64_t second = orchestrator.submit(command("spin"), sink);
  const std::uint64_t waiting = orchestrator.submit(command("print x"), sink);
  while (orchestrator.stats().counts.running < 2) std::this_thread::yield();
  std::this_thread::sleep_for(milliseconds(300));
  EXPECT_EQ(orchestrator.stats().counts.running, 2U);
  EXPECT_EQ(orchestrator.stats().queued, 1U);
  orchestrator.cancel(first);
  EXPECT_EQ(await(*sink, 1).at(0).ticket, first);
  EXPECT_EQ(await(*sink, 1).at(0).ticket, waiting);
  orchestrator.cancel(second);
  EXPECT_EQ(await(*sink, 1).at(0).ticket, second);
}

// Both of the first two run by then: one for longer than it keeps a slot, the other in the slot.
TEST(Orchestrator, AfterAQuarterOfItsTimeALongOneMakesRoomForOneMore) {
  Orchestrator orchestrator(stub_config(1));
  auto sink = std::make_shared<CompletionQueue>();
  const std::uint64_t late = orchestrator.submit(command("spin", milliseconds(8'000)), sink);
  const std::uint64_t other = orchestrator.submit(command("spin"), sink);
  const std::uint64_t waiting = orchestrator.submit(command("print x"), sink);
  const Completion first = await(*sink, 1).at(0);
  EXPECT_EQ(first.ticket, waiting);
  EXPECT_EQ(first.result.stdout_data, "x");
  orchestrator.cancel(late);
  EXPECT_EQ(await(*sink, 1).at(0).ticket, late);
  orchestrator.cancel(other);
  EXPECT_EQ(await(*sink, 1).at(0).ticket, other);
}

TEST(Orchestrator, AFullQueueAnswersAtOnce) {
  OrchestratorConfig small = stub_config(1);
  small.queue_capacity = 2;
  Orchestrator orchestrator(small);
  auto sink = std::make_shared<CompletionQueue>();
  bool refused = false;
  for (int i = 0; i < 4 && !refused; ++i) {  // one runs, two wait
    try {
      orchestrator.submit(command("spin"), sink);
    } catch (const QueueFull&) {
      refused = true;
    }
  }
  EXPECT_TRUE(refused);
}

TEST(Orchestrator, CancelWhileQueuedAndWhileRunning) {
  Orchestrator orchestrator(stub_config(1));
  auto sink = std::make_shared<CompletionQueue>();
  const std::uint64_t running = orchestrator.submit(command("spin"), sink);
  const std::uint64_t queued = orchestrator.submit(command("spin"), sink);
  orchestrator.cancel(queued);
  orchestrator.cancel(running);
  orchestrator.cancel(987'654);
  for (const Completion& one : await(*sink, 2)) {
    EXPECT_EQ(one.result.status, Status::kInfra);
    EXPECT_NE(one.result.error.find("cancelled"), std::string::npos) << one.result.error;
  }
  expect_healthy(orchestrator);
}

TEST(Orchestrator, ClosingAnswersEveryoneAndLeavesNoProcess) {
  auto sink = std::make_shared<CompletionQueue>();
  {
    Orchestrator orchestrator(stub_config(1));
    for (int i = 0; i < 3; ++i) orchestrator.submit(command("spin"), sink);
    orchestrator.close();
    orchestrator.close();
    EXPECT_THROW(orchestrator.submit(command("print x"), sink), std::logic_error);
    EXPECT_THROW(orchestrator.submit(command("print x"), sink), std::logic_error);
  }
  for (const Completion& one : await(*sink, 3)) EXPECT_EQ(one.result.status, Status::kInfra);
  const StubProcesses left = stub_processes();
  EXPECT_TRUE(left.templates.empty() && left.zygotes.empty() && left.children.empty());
}

TEST(Orchestrator, ClosingWhileOthersSubmit) {
  for (int round = 0; round < 5; ++round) {
    auto sink = std::make_shared<CompletionQueue>();
    Orchestrator orchestrator(stub_config(2, {"bare", "second"}));
    std::size_t accepted = 0;
    std::thread submitter([&] {
      try {
        for (;; ++accepted) {
          Request request = command("print x");
          request.tier = accepted % 7 == 0 ? 1 : 0;
          orchestrator.submit(request, sink);
          if (accepted > 3'000) return;
        }
      } catch (const std::logic_error&) {  // closed
        return;
      } catch (const QueueFull&) {
        return;
      }
    });
    std::this_thread::sleep_for(milliseconds(3 * round));
    orchestrator.close();
    submitter.join();
    const OrchestratorStats stats = orchestrator.stats();
    EXPECT_EQ(stats.submitted, stats.completed);
    await(*sink, stats.submitted);
  }
}

// The group of a tree, or else its zygote's watch: either way.
class Memory : public testing::TestWithParam<bool> {
 protected:
  Memory() {
    if (!GetParam()) return;
    config_.cgroups = std::make_shared<CgroupPool>();
    config_.env.push_back("STUB_CGROUP=" + config_.cgroups->path());
  }
  void SetUp() override {
    if (GetParam() && config_.cgroups->version() == CgroupVersion::kNone) {
      GTEST_SKIP() << config_.cgroups->reason();
    }
  }
  static Request greedy(const std::string& payload, std::uint64_t mebibytes) {
    Request request = command(payload);
    request.limits.memory_bytes = mebibytes << 20;
    return request;
  }

  OrchestratorConfig config_ = stub_config(1);
};

INSTANTIATE_TEST_SUITE_P(With, Memory, testing::Bool(), [](const auto& param) {
  return std::string(param.param ? "ControlGroup" : "Watch");
});

TEST_P(Memory, ATreeThatGrowsTooLargeIsKilled) {
  Orchestrator orchestrator(config_);
  for (int round = 0; round < 3; ++round) {
    const Result result = run_one(orchestrator, greedy("grow-in-children 6 60", 100));
    EXPECT_EQ(result.status, Status::kMemory) << result.error;
    expect_healthy(orchestrator);
  }
  EXPECT_EQ(run_one(orchestrator, greedy("grow 60", 100)).status, Status::kOk);
  EXPECT_EQ(run_one(orchestrator, greedy("grow 200", 100)).status, Status::kError) << "refused";
}

TEST_P(Memory, AKillThatASnippetSurvivedIsNotTheNextOnes) {
  Orchestrator orchestrator(config_);
  if (GetParam()) {
    EXPECT_EQ(run_one(orchestrator, greedy("survive-children 6 60", 100)).status, Status::kOk);
  }
  EXPECT_EQ(run_one(orchestrator, command("exit 1")).status, Status::kError);
}

}  // namespace
}  // namespace thor
