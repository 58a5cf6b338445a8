// An orchestrator over the stub guest, and what its tests ask of it.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "thor/orchestrator.h"

namespace thor {

using std::chrono::milliseconds;

OrchestratorConfig stub_config(std::uint32_t slots = 2, std::vector<std::string> tiers = {"bare"});

Request command(std::string payload, milliseconds timeout = milliseconds(20'000));

// Waits until `count` results came, each ticket's once; fails the test if one takes a minute.
std::vector<Completion> await(CompletionQueue& sink, std::size_t count);

// Runs all and returns results by position.
std::vector<Result> run_all(Orchestrator& orchestrator, const std::vector<Request>& requests);
Result run_one(Orchestrator& orchestrator, const Request& request);

// One step of a dialogue.
Result ask(Orchestrator& orchestrator, std::uint64_t dialogue, const std::string& data,
           milliseconds timeout = milliseconds(20'000), std::uint32_t tier = 0);

void expect_healthy(Orchestrator& orchestrator, std::uint32_t tier = 0);

// What StartError says; fails the test if there is none.
std::string start_error(const OrchestratorConfig& config);

// Processes of the stub below this one. A template's parent is us, a zygote's is a template.
struct StubProcesses {
  std::vector<int> templates;
  std::vector<int> zygotes;
  std::vector<int> children;
};
StubProcesses stub_processes();

// Within a minute; what takes a fast machine milliseconds may take a loaded one seconds.
bool holds_soon(const std::function<bool()>& condition);

}  // namespace thor
