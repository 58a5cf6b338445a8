// The orchestrator against a real zygote: real namespaces, real clocks, no interpreter.
#include "thor/orchestrator.h"

#include <dirent.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace thor {
namespace {

using std::chrono::milliseconds;

OrchestratorConfig config(std::uint32_t slots = 2) {
  return {.argv = {STUB_ZYGOTE}, .env = {}, .slots = slots};
}

Request command(std::string payload, milliseconds timeout = milliseconds(5'000)) {
  Request request{.payload = std::move(payload)};
  request.limits.timeout = timeout;
  request.limits.max_output_bytes = 1'000;
  return request;
}

// Runs all and returns results by position; fails the test if one is missing for a minute.
std::vector<Result> run_all(Orchestrator& orchestrator, const std::vector<Request>& requests) {
  auto sink = std::make_shared<CompletionQueue>();
  std::map<std::uint64_t, std::size_t> position;
  for (const Request& request : requests) {
    const std::uint64_t ticket = orchestrator.submit(request, sink);
    position[ticket] = position.size();
  }
  std::vector<Result> results(requests.size());
  std::size_t missing = requests.size();
  while (missing > 0) {
    const auto done = sink->wait(std::chrono::minutes(1));
    EXPECT_FALSE(done.empty()) << missing << " results never came";
    if (done.empty()) break;
    for (const Completion& c : done) results[position.at(c.ticket)] = c.result;
    missing -= done.size();
  }
  return results;
}

Result run_one(Orchestrator& orchestrator, const Request& request) {
  return run_all(orchestrator, {request}).front();
}

void expect_healthy(Orchestrator& orchestrator) {
  const Result result = run_one(orchestrator, command("print alive"));
  EXPECT_EQ(result.status, Status::kOk) << result.error;
  EXPECT_EQ(result.stdout_data, "alive");
}

int parent_of(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(file, text);
  const std::size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream rest(text.substr(name_end + 1));
  std::string state;
  int parent = 0;
  rest >> state >> parent;
  return parent;
}

// Zygotes below this process; another test may have its own.
std::vector<int> zygote_processes() {
  std::vector<int> pids;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (!std::all_of(name.begin(), name.end(), ::isdigit)) continue;
    const int pid = std::stoi(name);
    int ancestor = pid;
    while (ancestor != 0 && ancestor != ::getpid()) ancestor = parent_of(ancestor);
    std::ifstream file(entry.path() / "cmdline");
    std::string cmdline;
    std::getline(file, cmdline, '\0');
    if (ancestor != 0 && cmdline == STUB_ZYGOTE) pids.push_back(pid);
  }
  return pids;
}

TEST(Orchestrator, StatusesAndTheNextSnippet) {
  Orchestrator orchestrator(config());
  const std::vector<std::pair<std::string, Status>> cases{{"print hello", Status::kOk},
                                                          {"exit 0", Status::kOk},
                                                          {"exit 3", Status::kError},
                                                          {"abort", Status::kError},
                                                          {"oom", Status::kMemory},
                                                          {"orphan", Status::kOk},
                                                          {"syscall-mount", Status::kOk},
                                                          {"flood 5000", Status::kOutput},
                                                          {"flood 1000000000", Status::kOutput}};
  for (const auto& [payload, status] : cases) {
    const Result result = run_one(orchestrator, command(payload));
    EXPECT_EQ(result.status, status) << payload << ": " << result.error;
    expect_healthy(orchestrator);
  }
}

TEST(Orchestrator, TimeLimitsKillAndKeepAccounts) {
  Orchestrator orchestrator(config());
  const Result result = run_one(orchestrator, command("spin", milliseconds(200)));
  EXPECT_EQ(result.status, Status::kTimeout);
  EXPECT_GE(result.wall, milliseconds(200));
  EXPECT_GT(result.cpu, milliseconds(50));  // the other core may be busy: well below the wall
  Request greedy = command("spin", milliseconds(30'000));
  greedy.limits.cpu = std::chrono::seconds(1);
  EXPECT_EQ(run_one(orchestrator, greedy).status, Status::kTimeout);
  const Result stubborn = run_one(orchestrator, command("sleep-ignoring-term", milliseconds(100)));
  EXPECT_EQ(stubborn.status, Status::kTimeout);
  expect_healthy(orchestrator);
}

TEST(Orchestrator, EachSnippetIsPidTwoOfItsOwnWorld) {
  Orchestrator orchestrator(config());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(run_one(orchestrator, command("getpid")).stdout_data, "2 1000");
  }
}

TEST(Orchestrator, StdinArrivesWhole) {
  Orchestrator orchestrator(config());
  Request request = command("echo-stdin");
  request.stdin_data = std::string("a\0b\n", 4);
  EXPECT_EQ(run_one(orchestrator, request).stdout_data, request.stdin_data);
}

TEST(Orchestrator, ManyThreadsSubmitAndEachGetsItsOwn) {
  Orchestrator orchestrator(config());
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
  EXPECT_EQ(orchestrator.stats().running, 0U);
}

TEST(Orchestrator, AFullQueueAnswersAtOnce) {
  OrchestratorConfig small = config(1);
  small.queue_capacity = 2;
  Orchestrator orchestrator(small);
  auto sink = std::make_shared<CompletionQueue>();
  bool refused = false;
  for (int i = 0; i < 4 && !refused; ++i) {  // one runs, two wait
    try {
      orchestrator.submit(command("spin", milliseconds(300)), sink);
    } catch (const QueueFull&) {
      refused = true;
    }
  }
  EXPECT_TRUE(refused);
}

TEST(Orchestrator, CancelWhileQueuedAndWhileRunning) {
  Orchestrator orchestrator(config(1));
  auto sink = std::make_shared<CompletionQueue>();
  const std::uint64_t running = orchestrator.submit(command("spin", milliseconds(60'000)), sink);
  const std::uint64_t queued = orchestrator.submit(command("spin", milliseconds(60'000)), sink);
  orchestrator.cancel(queued);
  orchestrator.cancel(running);
  orchestrator.cancel(987'654);
  std::size_t answers = 0;
  while (answers < 2) {
    const auto done = sink->wait(std::chrono::seconds(20));
    ASSERT_FALSE(done.empty());
    for (const Completion& c : done) EXPECT_EQ(c.result.status, Status::kInfra);
    answers += done.size();
  }
  expect_healthy(orchestrator);
}

TEST(Orchestrator, ADeadZygoteCostsItsSnippetsAndNothingElse) {
  Orchestrator orchestrator(config(2));
  auto sink = std::make_shared<CompletionQueue>();
  for (int i = 0; i < 2; ++i) orchestrator.submit(command("spin", milliseconds(60'000)), sink);
  orchestrator.submit(command("print after"), sink);
  std::this_thread::sleep_for(milliseconds(100));
  const std::vector<int> pids = zygote_processes();
  ASSERT_FALSE(pids.empty());
  for (const int pid : pids) ::kill(pid, SIGKILL);
  int infra = 0;
  int ok = 0;
  while (infra + ok < 3) {
    const auto done = sink->wait(std::chrono::seconds(20));
    ASSERT_FALSE(done.empty());
    for (const Completion& c : done) ++(c.result.status == Status::kInfra ? infra : ok);
  }
  EXPECT_EQ(infra, 2);
  EXPECT_EQ(ok, 1);
  EXPECT_EQ(orchestrator.stats().zygote_starts, 2U);
  expect_healthy(orchestrator);
}

TEST(Orchestrator, ClosingAnswersEveryoneAndLeavesNoProcess) {
  auto sink = std::make_shared<CompletionQueue>();
  {
    Orchestrator orchestrator(config(1));
    for (int i = 0; i < 3; ++i) orchestrator.submit(command("spin", milliseconds(60'000)), sink);
    orchestrator.close();
    orchestrator.close();
    EXPECT_THROW(orchestrator.submit(command("print x"), sink), std::logic_error);
  }
  const auto done = sink->drain();
  ASSERT_EQ(done.size(), 3U);
  for (const Completion& c : done) EXPECT_EQ(c.result.status, Status::kInfra);
  EXPECT_TRUE(zygote_processes().empty());
}

TEST(Orchestrator, AZygoteThatCannotStartIsAnErrorWithItsWords) {
  OrchestratorConfig failing = config();
  failing.env = {"STUB_FAIL=1"};
  try {
    const Orchestrator orchestrator(failing);
    FAIL() << "started";
  } catch (const StartError& e) {
    EXPECT_NE(std::string(e.what()).find("stub refuses to start"), std::string::npos) << e.what();
  }
  failing.argv = {"/nonexistent/interpreter"};
  EXPECT_THROW(const Orchestrator orchestrator(failing), StartError);
  failing.argv = {};
  EXPECT_THROW(const Orchestrator orchestrator(failing), StartError);
}

}  // namespace
}  // namespace thor
