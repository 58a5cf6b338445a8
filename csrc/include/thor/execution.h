// What is run and what comes back. Standard library only; no Python types.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace thor {

// What became of one snippet; thor_fast.types.Status is its Python twin.
enum class Status : std::uint8_t { kOk, kError, kTimeout, kMemory, kOutput, kKilled, kInfra };

// Limits of one snippet. All are upper bounds; none may be zero.
struct Limits {
  std::chrono::nanoseconds timeout{std::chrono::seconds(10)};  // wall clock, from its start
  std::chrono::nanoseconds cpu{std::chrono::seconds(10)};      // per process, whole seconds, up
  std::uint64_t memory_bytes = std::uint64_t{1} << 30;         // private memory, per process
  std::uint64_t max_output_bytes = std::uint64_t{1} << 20;     // kept of each stream
  std::uint32_t max_processes = 32;                            // processes and threads at a time
};

struct Request {
  std::string payload;  // opaque here: what the guest is handed (source, files, environment)
  std::string stdin_data;
  Limits limits;
  std::uint32_t tier = 0;  // which template's jails; one that cannot start is replaced by a lighter
  std::int32_t priority = 0;  // higher goes first; equals in the order of submission
  // Paths below the working directory whose contents the result shall hold.
  std::vector<std::string> collect;
  // Only where it opens a dialogue. What its steps write is one output, and their time one time,
  // which the last step's result holds.
  bool accumulate = false;
  std::chrono::nanoseconds life{std::chrono::hours(1)};  // of the dialogue, from its first step
};

struct Result {
  Status status = Status::kInfra;
  std::string stdout_data;
  std::string stderr_data;
  int exit_code = -1;  // -1: did not exit by itself
  int signal = 0;      // 0: no signal ended it
  std::chrono::nanoseconds wall{0};
  std::chrono::nanoseconds cpu{0};
  std::uint64_t peak_memory_bytes = 0;
  bool truncated = false;
  std::map<std::string, std::string> files;  // those of Request::collect that there are
  std::string reply;                         // of a dialogue's guest; empty otherwise
  std::string error;                         // for kInfra: what of ours failed
};

}  // namespace thor
