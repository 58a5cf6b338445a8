// Processes that die or are killed at any moment, descriptors that run out, hosts that fork: every
// request is answered exactly once, with its own output if with any, and service goes on.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <ctime>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "stub_sandbox.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

TEST(Casualties, CancelStorm) {
  Orchestrator orchestrator(stub_config(3));
  auto sink = std::make_shared<CompletionQueue>();
  std::mt19937 random(11);  // NOLINT(bugprone-random-generator-seed): the same cases every time
  std::map<std::uint64_t, std::string> expected;
  std::vector<Completion> done;
  constexpr std::size_t kRequests = 2'000;
  for (std::size_t i = 0; i < kRequests; ++i) {
    const std::string mine = std::to_string(i);
    const std::uint64_t ticket = orchestrator.submit(command("print " + mine), sink);
    expected[ticket] = mine;
    for (auto pause = random() % 40'000; pause > 0; --pause) static_cast<void>(::getppid());
    if (random() % 3 != 0) orchestrator.cancel(ticket - random() % 3);
    while (orchestrator.stats().queued > 20) std::this_thread::yield();
  }
  std::size_t ok = 0;
  for (const Completion& one : await(*sink, kRequests)) {
    if (one.result.status != Status::kOk) {
      EXPECT_EQ(one.result.error, "cancelled by the caller");
      continue;
    }
    ++ok;
    EXPECT_EQ(one.result.stdout_data, expected.at(one.ticket));
  }
  EXPECT_GT(ok, 0U);
  expect_healthy(orchestrator);
}

enum class Victim : std::uint8_t { kTemplate, kZygote, kChild };

class Killing : public testing::TestWithParam<Victim> {};
std::string victims_name(const testing::TestParamInfo<Victim>& param) {
  switch (param.param) {
    case Victim::kTemplate: return "Template";
    case Victim::kZygote: return "Zygote";
    case Victim::kChild: return "Child";
  }
  return "";
}
INSTANTIATE_TEST_SUITE_P(A, Killing,
                         testing::Values(Victim::kTemplate, Victim::kZygote, Victim::kChild),
                         &victims_name);

TEST_P(Killing, WhileManyAreInFlight) {
  Orchestrator orchestrator(stub_config(2, {"bare", "second"}));
  for (int round = 0; round < 6; ++round) {
    auto sink = std::make_shared<CompletionQueue>();
    std::map<std::uint64_t, std::string> expected;
    for (int i = 0; i < 60; ++i) {
      Request request = command("print " + std::to_string(i));
      request.tier = static_cast<std::uint32_t>(i % 2);
      expected[orchestrator.submit(request, sink)] = std::to_string(i);
    }
    std::this_thread::sleep_for(milliseconds(round));
    const StubProcesses found = stub_processes();
    const std::vector<int>& victims = GetParam() == Victim::kTemplate ? found.templates
                                      : GetParam() == Victim::kZygote ? found.zygotes
                                                                      : found.children;
    for (const int pid : victims) ::kill(pid, SIGKILL);
    for (const Completion& one : await(*sink, expected.size())) {
      if (one.result.status == Status::kOk) {
        EXPECT_EQ(one.result.stdout_data, expected.at(one.ticket));
      } else if (GetParam() != Victim::kChild) {
        EXPECT_EQ(one.result.status, Status::kInfra);
      }
    }
    expect_healthy(orchestrator, 0);
    expect_healthy(orchestrator, 1);
  }
}

TEST(Casualties, AParkedChildThatIsKilledCostsItsJailOnly) {
  Orchestrator orchestrator(stub_config(1));
  for (int round = 0; round < 5; ++round) {
    expect_healthy(orchestrator);
    std::vector<int> parked;
    ASSERT_TRUE(holds_soon([&] { return !(parked = stub_processes().children).empty(); }));
    ::kill(parked.front(), SIGKILL);
    ASSERT_TRUE(holds_soon([&] { return orchestrator.stats().counts.jails == 0; }));
  }
  expect_healthy(orchestrator);
}

// So many open descriptors that no other can be had, until this goes.
class NoDescriptors {
 public:
  NoDescriptors() {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    rlimit few = before_;
    few.rlim_cur = 512;
    ::setrlimit(RLIMIT_NOFILE, &few);
    for (int fd = 0; (fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;) all_.emplace_back(fd);
  }
  NoDescriptors(const NoDescriptors&) = delete;
  NoDescriptors& operator=(const NoDescriptors&) = delete;
  ~NoDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

  void give(std::size_t count) { all_.resize(all_.size() - count); }

 private:
  rlimit before_{};
  std::vector<UniqueFd> all_;
};

TEST(Casualties, WithoutDescriptorsRequestsAreAnsweredAndServiceComesBack) {
  Orchestrator orchestrator(stub_config(2));
  expect_healthy(orchestrator);
  for (std::size_t spare = 0; spare < 14; ++spare) {
    {
      auto sink = std::make_shared<CompletionQueue>();
      Request collecting = command("write mine 1");
      collecting.collect = {"mine"};
      NoDescriptors none;
      none.give(spare);
      orchestrator.submit(collecting, sink);  // and its jail is to be replaced
      orchestrator.submit(command("spin", milliseconds(100)), sink);  // its pipes to be watched
      orchestrator.submit(command("print x"), sink);
      await(*sink, 3);
    }
    expect_healthy(orchestrator);
  }
}

TEST(Casualties, WithoutDescriptorsStartingIsAnError) {
  for (std::size_t spare = 0; spare < 16; ++spare) {
    NoDescriptors none;
    none.give(spare);
    try {
      const Orchestrator orchestrator(stub_config(1));
    } catch (const StartError& e) {
      EXPECT_NE(std::string(e.what()), "");
    }
  }
}

double cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// A fork keeps our descriptors open behind our back: what we close must be forgotten by epoll, and
// other ends must learn of it.
TEST(Casualties, AHostThatForksCostsNothing) {
  OrchestratorConfig config = stub_config(1);
  Orchestrator orchestrator(config);
  auto sink = std::make_shared<CompletionQueue>();
  orchestrator.submit(command("orphans 1"), sink);
  await(*sink, 1);
  const std::uint64_t slow = orchestrator.submit(command("sleep-ignoring-term"), sink);
  const std::uint64_t dialogue = orchestrator.open_dialogue({.payload = "talk"});
  std::this_thread::sleep_for(milliseconds(50));  // its pipes are watched now
  const pid_t fork = ::fork();
  if (fork == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) ::pause();
  }
  orchestrator.cancel(slow);
  await(*sink, 1);
  EXPECT_EQ(ask(orchestrator, dialogue, "leave").exit_code, 7);
  expect_healthy(orchestrator);
  const double before = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(500));
  EXPECT_LT(cpu_seconds() - before, 0.1) << "the idle orchestrator spins";
  orchestrator.close();
  const StubProcesses left = stub_processes();
  EXPECT_TRUE(left.templates.empty() && left.zygotes.empty());
  ::kill(fork, SIGKILL);
  ::waitpid(fork, nullptr, 0);
}

}  // namespace
}  // namespace thor
