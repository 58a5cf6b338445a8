// Runs snippets in a zygote's children; the one object a host process needs.
//
//   caller threads          orchestrator thread (epoll)             zygote (other process)
//   submit() -- queue ---->  RUN + fds over SEQPACKET  ------------> clone a jailed child
//                            <------------------- STARTED + pidfd --
//                            drains stdout/stderr, watches the clock,
//                            kills by pidfd
//                            <---------------------------- EXITED --  wait4
//   CompletionQueue <------  classify, push
//
// Callers never block on a snippet unless they call CompletionQueue::wait. At most `slots` snippets
// run at a time; the rest queue here, and their clocks start only when they do.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "thor/completion_queue.h"
#include "thor/execution.h"

namespace thor {

// How the zygote is started: an interpreter that ends up in thor::serve_zygote on fd 3.
struct OrchestratorConfig {
  std::vector<std::string> argv;
  std::vector<std::string> env;
  std::uint32_t slots = 1;
  std::size_t queue_capacity = 4096;
  std::chrono::milliseconds startup_timeout{60'000};
};

struct OrchestratorStats {
  std::uint64_t submitted = 0;
  std::uint64_t completed = 0;
  std::uint64_t queued = 0;
  std::uint64_t running = 0;
  std::uint64_t zygote_starts = 0;
};

// The sandbox could not be started; what() names the step.
class StartError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The queue is full: an answer, not a hang.
class QueueFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Orchestrator {
 public:
  // Starts the zygote and waits until it can serve. Throws StartError.
  explicit Orchestrator(OrchestratorConfig config);
  ~Orchestrator();  // close()
  Orchestrator(const Orchestrator&) = delete;
  Orchestrator& operator=(const Orchestrator&) = delete;

  // Queues a request; its result is pushed to `sink` exactly once, whatever happens.
  // Throws QueueFull, or std::logic_error once closed.
  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink);

  // Kills or dequeues; the result (INFRA, "cancelled") is still pushed. Unknown: ignored.
  void cancel(std::uint64_t ticket);

  [[nodiscard]] OrchestratorStats stats() const;

  // Kills everything, answers everything in flight with INFRA, joins. Safe to call twice.
  void close();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thor
