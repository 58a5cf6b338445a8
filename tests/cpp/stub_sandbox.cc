#include "stub_sandbox.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <thread>

namespace thor {
namespace {

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
  return state == "Z" ? 0 : parent;
}

}  // namespace

OrchestratorConfig stub_config(std::uint32_t slots, std::vector<std::string> tiers) {
  OrchestratorConfig config;
  for (std::string& name : tiers) config.tiers.push_back({name, {STUB_TEMPLATE, name}});
  config.slots = slots;
  config.max_dialogues = 4;
  return config;
}

Request command(std::string payload, milliseconds timeout) {
  Request request{.payload = std::move(payload)};
  request.limits.timeout = timeout;
  request.limits.max_output_bytes = 1'000;
  return request;
}

std::vector<Completion> await(CompletionQueue& sink, std::size_t count) {
  std::vector<Completion> all;
  std::set<std::uint64_t> tickets;
  while (all.size() < count) {
    std::vector<Completion> done = sink.wait(std::chrono::minutes(1));
    EXPECT_FALSE(done.empty()) << count - all.size() << " results never came";
    if (done.empty()) break;
    for (Completion& one : done) {
      EXPECT_TRUE(tickets.insert(one.ticket).second) << one.ticket << " answered twice";
      all.push_back(std::move(one));
    }
  }
  EXPECT_EQ(all.size(), count);
  return all;
}

std::vector<Result> run_all(Orchestrator& orchestrator, const std::vector<Request>& requests) {
  auto sink = std::make_shared<CompletionQueue>();
  std::map<std::uint64_t, std::size_t> position;
  for (const Request& request : requests) {
    const std::uint64_t ticket = orchestrator.submit(request, sink);
    position[ticket] = position.size();
  }
  std::vector<Result> results(requests.size());
  for (Completion& one : await(*sink, requests.size())) {
    results[position.at(one.ticket)] = std::move(one.result);
  }
  return results;
}

Result run_one(Orchestrator& orchestrator, const Request& request) {
  return run_all(orchestrator, {request}).front();
}

Result ask(Orchestrator& orchestrator, std::uint64_t dialogue, const std::string& data,
           milliseconds timeout, std::uint32_t tier) {
  auto sink = std::make_shared<CompletionQueue>();
  orchestrator.step(dialogue, data, command("", timeout).limits, tier, sink);
  const std::vector<Completion> done = await(*sink, 1);
  return done.empty() ? Result{} : done.front().result;
}

void expect_healthy(Orchestrator& orchestrator, std::uint32_t tier) {
  Request request = command("print alive");
  request.tier = tier;
  const Result result = run_one(orchestrator, request);
  EXPECT_EQ(result.status, Status::kOk) << result.error;
  EXPECT_EQ(result.stdout_data, "alive");
}

std::string start_error(const OrchestratorConfig& config) {
  try {
    const Orchestrator orchestrator(config);
  } catch (const StartError& e) {
    return e.what();
  }
  ADD_FAILURE() << "started";
  return "";
}

StubProcesses stub_processes() {
  StubProcesses found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (!std::ranges::all_of(name, [](unsigned char c) { return std::isdigit(c) != 0; })) continue;
    const int pid = std::stoi(name);
    std::ifstream file(entry.path() / "cmdline");
    std::string cmdline;
    std::getline(file, cmdline, '\0');
    if (cmdline != STUB_TEMPLATE) continue;
    int generation = 0;
    int ancestor = pid;
    for (; ancestor != 0 && ancestor != ::getpid(); ++generation) ancestor = parent_of(ancestor);
    if (ancestor == 0) continue;
    (generation == 1   ? found.templates
     : generation == 2 ? found.zygotes
                       : found.children)
        .push_back(pid);
  }
  return found;
}

bool holds_soon(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(5));
  }
  return true;
}

}  // namespace thor
