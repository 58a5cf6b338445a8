// One tier's template as the orchestrator sees it: a process that makes jails on request.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "core/deadlines.h"
#include "core/spawn.h"
#include "thor/orchestrator.h"
#include "util/unique_fd.h"

namespace thor {

class Tier {
 public:
  enum class State : std::uint8_t { kAbsent, kStarting, kReady, kFailed };

  Tier(TierConfig config, std::vector<std::string> env, std::vector<int> cpus)
      : config_(std::move(config)), env_(std::move(env)), cpus_(std::move(cpus)) {}
  Tier(Tier&&) = default;
  Tier& operator=(Tier&&) = delete;
  Tier(const Tier&) = delete;
  Tier& operator=(const Tier&) = delete;
  ~Tier() { stop(); }

  [[nodiscard]] State state() const { return state_; }
  [[nodiscard]] int control_fd() const { return process_.control.get(); }
  [[nodiscard]] const std::string& name() const { return config_.name; }

  // Starts the process; it says by itself when it is ready. Throws std::system_error.
  void start();

  // Takes what the process says. False once it is of no more use, to be stopped: why is in
  // `reason`.
  bool listen(std::string* reason);

  // Asks for a jail; its end of the socket that is returned tells what became of it. Throws
  // std::system_error.
  [[nodiscard]] UniqueFd make_jail(std::uint32_t uid_offset, int cgroup_procs) const;

  // Ends the process and all its jails. Another start() may follow, unless it has failed too often.
  void stop();

  // A jail of it served: it works.
  void succeeded() { failed_starts_ = 0; }

 private:
  TierConfig config_;
  std::vector<std::string> env_;
  std::vector<int> cpus_;
  Spawned process_;
  State state_ = State::kAbsent;
  int failed_starts_ = 0;
};

}  // namespace thor
