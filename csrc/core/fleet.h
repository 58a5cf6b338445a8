// Templates and jails at work: the orchestrator's thread, and nothing of it is shared.
//
// A request takes a slot and a jail of its tier: one whose child is parked, or one that is being
// prepared, or a new one. It is sent to the child directly. The zygote reports when the child and
// all its descendants are gone, and parks the next one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/cgroup.h"
#include "core/deadlines.h"
#include "core/jail_handle.h"
#include "core/job_queue.h"
#include "core/tier.h"
#include "thor/orchestrator.h"

namespace thor {

inline constexpr std::size_t kMaxTiers = 64;  // bits of a TierMask

class Fleet {
 public:
  // `wake` is an eventfd: written, it ends a turn's wait. Throws std::system_error.
  Fleet(const OrchestratorConfig& config, int wake, JobQueue* jobs);
  ~Fleet();  // kills all; what ran is answered with INFRA
  Fleet(const Fleet&) = delete;
  Fleet& operator=(const Fleet&) = delete;

  // Until a jail of the first tier serves. False, with the reason, if that cannot be had. Throws
  // std::system_error when out of descriptors or memory.
  bool start(std::string* reason);

  // Waits for something to happen and deals with it. False, with the reason, when there is nobody
  // left to serve requests.
  bool turn(std::string* reason);

 private:
  enum class Source : std::uint32_t { kWake, kTier, kJail, kOutput, kErrorOutput, kDialogue };
  struct Dialogue {
    std::size_t jail = 0;     // meaningless once it has ended
    std::string ended;        // why, if it has
    std::deque<Job> waiting;  // steps for when the one in progress is over
  };
  // A jail's memory group and what it was last told. Kept for the next jail at the same index.
  struct Group {
    Cgroup cgroup;
    std::uint64_t limit = 0;
    std::uint64_t oom_kills = 0;
  };

  static std::uint64_t tag(Source source, std::size_t index);
  void watch(int fd, Source source, std::size_t index);
  void unwatch(int fd) const;
  void handle(std::uint64_t about, bool hung_up);
  void on_deadline(std::size_t index);
  void heed_wishes();
  void cancel_waiting_step(std::uint64_t ticket);
  void publish();

  // Tiers.
  void start_wanted_tiers();
  void start_tier(std::size_t tier);
  void on_tier(std::size_t tier);
  void tier_failed(std::size_t tier);

  // Jails.
  std::size_t free_index();
  std::size_t make_jail(std::size_t tier);
  void replace_jail(std::size_t tier);
  std::size_t jail_for(std::size_t tier);
  Group* group_of(std::size_t index);
  bool killed_for_memory(std::size_t index);
  void on_jail(std::size_t index);
  void on_jail_gone(std::size_t index, const std::string& why);
  void on_parked(std::size_t index, const Message& parked, std::vector<UniqueFd> fds);
  void on_exited(std::size_t index, const Message& exited, const std::vector<UniqueFd>& files);
  void discard(std::size_t index, Result result);
  void watch_output(std::size_t index);
  [[nodiscard]] Clock::time_point next_deadline(const Slot& slot) const;
  void unwatch_output(std::size_t index);

  // Requests (fleet_requests.cc).
  [[nodiscard]] bool has_room() const;
  void serve_queued();
  void serve_step(Job job);
  void bind(std::size_t index, Job job);
  void run(std::size_t index);
  void ask(std::size_t index);
  void on_output(std::size_t index, UniqueFd JailHandle::* stream, bool hung_up);
  void on_reply(std::size_t index);
  void hang_up(std::size_t index);
  void kill(std::size_t index, KillReason reason);
  void finish(std::size_t index, Result result);
  void end_dialogue(std::size_t index, const std::string& why);
  void close_dialogue(std::uint64_t id);

  [[nodiscard]] std::size_t deadline_of_jail(std::size_t index) const {
    return tiers_.size() + index;
  }

  const OrchestratorConfig& config_;
  JobQueue* const jobs_;
  UniqueFd epoll_;
  int wake_;
  std::vector<Tier> tiers_;
  std::vector<std::unique_ptr<JailHandle>> jails_;  // by index; null: free
  std::vector<Group> groups_;                       // by the same index
  std::vector<std::size_t> replacements_;           // tiers that lost a jail to a snippet's traces
  std::map<std::uint64_t, Dialogue> dialogues_;     // those that had a step
  Deadlines deadlines_;                             // of tiers, then of jails
  std::size_t running_ = 0;
  std::size_t aged_ = 0;  // of them
  std::size_t late_ = 0;  // of these
  std::string failure_;   // why the last tier or jail could not start
  OrchestratorCounts counts_;
};

}  // namespace thor
