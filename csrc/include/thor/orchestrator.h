// Runs snippets in the jails of warm interpreters; the one object a host process needs.
//
//   caller threads      orchestrator thread (epoll)              templates, one per tier
//   submit() -- queue -->  picks a jail whose child waits    MAKE_JAIL -> clone a jail: a zygote
//                          RUN ------------------------------------------> its parked child runs
//                          drains stdout and stderr, watches the clock,
//                          kills by pidfd
//                          <---------------- EXITED from the zygote, its namespace empty again
//   CompletionQueue <----  verdict, push
//                          <---------------- PARKED: it has forked the next child
//
// Callers never block on a snippet unless they call CompletionQueue::wait. At most `slots` snippets
// run at a time, besides as many that have run for longer than 0.1 s, and one more for each of
// these that has used up a quarter of its time; the rest queue here, and their clocks start only
// when they do.
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

class CgroupPool;

// How a template is started: an interpreter that ends up in thor::serve_template on fd 3.
struct TierConfig {
  std::string name;
  std::vector<std::string> argv;
};

struct OrchestratorConfig {
  std::vector<TierConfig> tiers;  // the first starts at once, the others when first asked for
  std::vector<std::string> env;
  std::vector<int> cpus;                        // where snippets run; empty: where the caller may
  std::uint32_t slots = 1;                      // snippets that run at a time, see above
  std::chrono::milliseconds slot_keeping{100};  // after which one no longer keeps others waiting
  std::uint32_t max_dialogues = 64;             // open at a time
  std::size_t queue_capacity = 4096;
  std::chrono::milliseconds startup_timeout{60'000};
  std::shared_ptr<CgroupPool> cgroups;  // null: zygotes watch their snippets' memory
};

// What the orchestrator made so far.
struct OrchestratorCounts {
  std::uint64_t template_starts = 0;
  std::uint64_t jails_made = 0;
  std::uint64_t jails_discarded = 0;  // because a snippet left traces
  std::uint64_t jails = 0;            // now
  std::uint64_t running = 0;          // now
  std::uint32_t layers = 0;           // bits of thor::Layer that the first jail has
};

struct OrchestratorStats {
  std::uint64_t submitted = 0;
  std::uint64_t completed = 0;
  std::uint64_t queued = 0;
  std::uint64_t dialogues = 0;  // open
  OrchestratorCounts counts;
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
  // Starts the first template and waits until a jail of it can serve. Throws StartError.
  explicit Orchestrator(OrchestratorConfig config);
  ~Orchestrator();  // close()
  Orchestrator(const Orchestrator&) = delete;
  Orchestrator& operator=(const Orchestrator&) = delete;

  // Queues a request; its result is pushed to `sink` exactly once, whatever happens.
  // Throws QueueFull, or std::logic_error once closed.
  std::uint64_t submit(Request request, std::shared_ptr<CompletionQueue> sink);

  // A dialogue is one process that is asked several things, one after another: `opening` is handed
  // to its guest when the first step is served. Its clock runs during steps only, and only its
  // steps need a slot. Throws QueueFull when max_dialogues are open.
  std::uint64_t open_dialogue(Request opening);

  // Queues the next step: `data` is sent to the guest, whose answer is Result::reply. If the
  // process ends instead, the result is that of a snippet, and later steps are INFRA. `tier` is
  // the same for all steps of a dialogue. Throws as submit does.
  std::uint64_t step(std::uint64_t dialogue, std::string data, const Limits& limits,
                     std::uint32_t tier, std::shared_ptr<CompletionQueue> sink);

  // Ends the process and frees what it holds. Unknown or closed already: ignored.
  void close_dialogue(std::uint64_t dialogue);

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
