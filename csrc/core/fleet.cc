#include "core/fleet.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <system_error>
#include <utility>

#include "core/collect.h"
#include "util/pidfd.h"

namespace thor {
namespace {

// Jails that may die before they took a request, one after another, for each request.
constexpr int kMaxAttempts = 4;

std::string out_of_turn(const Message& message, std::size_t fds, bool preparing) {
  return "a jail sent message " + std::to_string(static_cast<std::uint32_t>(message.kind)) +
         " with " + std::to_string(fds) + " descriptors, expected " +
         (preparing ? "that a child is parked (4, with 3)" : "that its child ended (6)");
}

}  // namespace

Fleet::Fleet(const OrchestratorConfig& config, int wake, JobQueue* jobs)
    : config_(config),
      jobs_(jobs),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      wake_(wake),
      jails_((config.tiers.size() + 2) * config.slots + config.max_dialogues),
      groups_(jails_.size()),
      deadlines_(config.tiers.size() + jails_.size()) {
  if (!epoll_) throw std::system_error(errno, std::generic_category(), "epoll_create1");
  for (const TierConfig& tier : config.tiers) {
    tiers_.emplace_back(tier, config.env, config.cpus);
  }
  watch(wake_, Source::kWake, 0);
}

Fleet::~Fleet() {
  const std::string reason = jobs_->reason().empty() ? "the sandbox was closed" : jobs_->reason();
  for (std::size_t i = 0; i < jails_.size(); ++i) {
    if (jails_[i]) discard(i, infra(reason));
  }
  for (auto& [id, dialogue] : dialogues_) {
    for (const Job& job : dialogue.waiting) jobs_->answer(job, infra(reason));
  }
  tiers_.clear();  // their processes take the jails with them; then the groups are empty
  publish();
}

bool Fleet::start(std::string* reason) {
  start_tier(0);
  while (tiers_[0].state() == Tier::State::kStarting) {
    if (!turn(reason)) return false;
  }
  if (tiers_[0].state() == Tier::State::kReady) {
    const std::size_t first = make_jail(0);
    while (jails_[first] && jails_[first]->state == JailHandle::State::kPreparing) {
      if (!turn(reason)) return false;
    }
    if (jails_[first]) return true;
  }
  *reason = failure_;
  return false;
}

// --- one turn of the loop ------------------------------------------------------------------------

bool Fleet::turn(std::string* reason) {
  std::array<epoll_event, 64> events{};
  const int timeout = deadlines_.poll_timeout_ms(Clock::now());
  const int n = ::epoll_wait(epoll_.get(), events.data(), events.size(), timeout);
  // Nothing is made before all of these are dealt with: an index may not change its meaning.
  for (int i = 0; i < n; ++i) {
    const epoll_event& event = events[static_cast<std::size_t>(i)];
    handle(event.data.u64, (event.events & EPOLLHUP) != 0);
  }
  while (const auto index = deadlines_.expired(Clock::now())) on_deadline(*index);
  heed_wishes();
  start_wanted_tiers();
  serve_queued();
  publish();
  if (tiers_[0].state() != Tier::State::kFailed) return true;
  *reason = failure_;
  return false;
}

std::uint64_t Fleet::tag(Source source, std::size_t index) {
  return (std::uint64_t{static_cast<std::uint32_t>(source)} << 32) | index;
}

void Fleet::watch(int fd, Source source, std::size_t index) {
  epoll_event event{.events = EPOLLIN, .data = {.u64 = tag(source, index)}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
}

// Before a descriptor is closed: a fork of the host may hold it open, and epoll would go on to
// report it.
void Fleet::unwatch(int fd) const { ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

void Fleet::handle(std::uint64_t about, bool hung_up) {
  const auto index = static_cast<std::size_t>(about & 0xffffffffU);
  const auto source = static_cast<Source>(about >> 32);
  if (source == Source::kWake) {
    eventfd_t ignored = 0;
    ::eventfd_read(wake_, &ignored);
  } else if (source == Source::kTier) {
    on_tier(index);
  } else if (jails_[index]) {  // otherwise it went earlier in this turn
    switch (source) {
      case Source::kOutput: return on_output(index, &JailHandle::standard_output, hung_up);
      case Source::kErrorOutput: return on_output(index, &JailHandle::standard_error, hung_up);
      case Source::kDialogue: return on_reply(index);
      default: return on_jail(index);
    }
  }
}

void Fleet::on_deadline(std::size_t index) {
  if (index < tiers_.size()) {
    failure_ = "the sandbox's template '" + tiers_[index].name() + "' was not ready after " +
               std::to_string(config_.startup_timeout.count()) + " ms";
    return tier_failed(index);
  }
  index -= tiers_.size();
  JailHandle& jail = *jails_[index];
  if (jail.state == JailHandle::State::kPreparing) {
    failure_ =
        "a jail was not ready after " + std::to_string(config_.startup_timeout.count()) + " ms";
    return discard(index, infra(failure_));
  }
  if (!jail.slot) return discard(index, infra("its life is over"));  // a dialogue between steps
  Slot& slot = *jail.slot;
  if (slot.killed != KillReason::kNone) {  // and its zygote has not said that it is gone
    const Ending ending{.exited = {.started = true}};
    return discard(index, conclude(slot, ending, Clock::now()));
  }
  const Clock::time_point now = Clock::now();
  if (now >= slot.deadline()) return kill(index, KillReason::kTimeout);
  // This turn goes on to serve who waits.
  if (!slot.aged && now >= slot.ages(config_.slot_keeping)) {
    slot.aged = true;
    ++aged_;
  }
  if (!slot.late && now >= slot.is_late(config_.slot_keeping)) {
    slot.late = true;
    ++late_;
  }
  if (jail.watched) return deadlines_.set(deadline_of_jail(index), next_deadline(slot));
  try {
    watch_output(index);
  } catch (const std::system_error& e) {
    discard(index, infra(std::string("watching a snippet: ") + e.what()));
  }
}

void Fleet::heed_wishes() {
  const JobQueue::Wishes wishes = jobs_->take_wishes();
  for (const Job& job : wishes.waiting) jobs_->answer(job, infra("cancelled by the caller"));
  for (const std::uint64_t ticket : wishes.others) {
    for (std::size_t i = 0; i < jails_.size(); ++i) {
      if (jails_[i] && jails_[i]->slot && jails_[i]->slot->job.ticket == ticket) {
        kill(i, KillReason::kCancelled);
      }
    }
    cancel_waiting_step(ticket);
  }
  for (const std::uint64_t id : wishes.closed) close_dialogue(id);
  for (const Job& job : wishes.closed_steps) jobs_->answer(job, infra("the dialogue was closed"));
}

void Fleet::cancel_waiting_step(std::uint64_t ticket) {
  for (auto& [id, dialogue] : dialogues_) {
    const auto found = std::ranges::find(dialogue.waiting, ticket, &Job::ticket);
    if (found == dialogue.waiting.end()) continue;
    jobs_->answer(*found, infra("cancelled by the caller"));
    dialogue.waiting.erase(found);
    return;
  }
}

void Fleet::publish() {
  counts_.running = running_;
  counts_.jails = static_cast<std::uint64_t>(std::count_if(
      jails_.begin(), jails_.end(), [](const auto& jail) { return jail != nullptr; }));
  jobs_->set_counts(counts_);
}

// --- tiers ---------------------------------------------------------------------------------------

void Fleet::start_wanted_tiers() {
  TierMask wanted = jobs_->wanted();
  // Downwards, so that a tier is started in the very turn in which it inherits requests: nothing
  // might wake us for another.
  for (std::size_t i = tiers_.size(); i-- > 0;) {
    if ((wanted >> i & 1U) == 0) continue;
    while (tiers_[i].state() == Tier::State::kAbsent) start_tier(i);
    if (tiers_[i].state() == Tier::State::kFailed && i > 0) {
      jobs_->reroute(static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i - 1));
      wanted |= TierMask{1} << (i - 1);
    }
  }
}

void Fleet::start_tier(std::size_t tier) {
  try {
    tiers_[tier].start();
    watch(tiers_[tier].control_fd(), Source::kTier, tier);
    deadlines_.set(tier, Clock::now() + config_.startup_timeout);
    ++counts_.template_starts;
  } catch (const std::system_error& e) {
    failure_ = std::string("the sandbox's template could not be started: ") + e.what();
    tiers_[tier].stop();
  }
}

void Fleet::on_tier(std::size_t tier) {
  const bool alive = tiers_[tier].listen(&failure_);
  if (tiers_[tier].state() != Tier::State::kStarting) deadlines_.clear(tier);
  if (!alive) tier_failed(tier);
}

// Its jails died with it.
void Fleet::tier_failed(std::size_t tier) {
  unwatch(tiers_[tier].control_fd());
  tiers_[tier].stop();
  deadlines_.clear(tier);
  for (std::size_t i = 0; i < jails_.size(); ++i) {
    if (jails_[i] && jails_[i]->tier == tier) on_jail_gone(i, failure_);
  }
}

// --- jails ---------------------------------------------------------------------------------------

// Dialogues leave their jails to snippets when they end, so that idle ones can have taken all room.
std::size_t Fleet::free_index() {
  auto found = std::find(jails_.begin(), jails_.end(), nullptr);
  if (found == jails_.end()) {
    found = std::ranges::find_if(
        jails_, [](const auto& jail) { return !jail->slot && jail->dialogue == 0; });
  }
  if (found == jails_.end()) {
    throw std::system_error(
        EAGAIN, std::generic_category(),
        std::to_string(jails_.size()) + " jails are in use, the most at a time");
  }
  const auto index = static_cast<std::size_t>(found - jails_.begin());
  if (jails_[index]) discard(index, Result{});
  return index;
}

std::size_t Fleet::make_jail(std::size_t tier) {
  const std::size_t index = free_index();
  const Group* group = group_of(index);
  auto jail = std::make_unique<JailHandle>();
  jail->tier = static_cast<std::uint32_t>(tier);
  jail->socket = tiers_[tier].make_jail(static_cast<std::uint32_t>(index),
                                        group == nullptr ? -1 : group->cgroup.procs_fd());
  watch(jail->socket.get(), Source::kJail, index);
  deadlines_.set(deadline_of_jail(index), Clock::now() + config_.startup_timeout);
  jails_[index] = std::move(jail);
  if (group != nullptr) static_cast<void>(killed_for_memory(index));  // its predecessor's
  ++counts_.jails_made;
  return index;
}

// A jail that can take a request of this tier now or soon. Soon is better than now where that would
// have more jails at work than there are slots: a fork for the next snippet and this one would
// share a CPU, and both be late. (More jails there are once long snippets or dialogues needed
// them.)
std::size_t Fleet::jail_for(std::size_t tier) {
  std::optional<std::size_t> parked;
  std::optional<std::size_t> preparing;
  std::size_t at_work = 0;
  for (std::size_t i = 0; i < jails_.size(); ++i) {
    const JailHandle* jail = jails_[i].get();
    if (jail == nullptr || jail->tier != tier || jail->dialogue != 0) continue;
    const bool idle = jail->state == JailHandle::State::kParked && !jail->slot;
    const bool aged = jail->slot && jail->slot->aged;
    if (!idle && !aged) ++at_work;
    if (jail->slot) continue;
    (idle ? parked : preparing) = i;
  }
  if (parked && (!preparing || at_work < config_.slots)) return *parked;
  return preparing ? *preparing : make_jail(tier);
}

// Null where the tree's memory is watched by the zygote instead.
Fleet::Group* Fleet::group_of(std::size_t index) {
  if (!config_.cgroups) return nullptr;
  Group& group = groups_[index];
  if (!group.cgroup) {
    const CgroupError error =
        config_.cgroups->create("jail" + std::to_string(index), &group.cgroup);
    if (error)
      throw std::system_error(error.error_number, std::generic_category(), describe(error));
  }
  return &group;
}

// Since the last time anybody asked.
bool Fleet::killed_for_memory(std::size_t index) {
  Group& group = groups_[index];
  const std::uint64_t kills = group.cgroup.oom_kills().value_or(0);
  return kills > std::exchange(group.oom_kills, kills);
}

void Fleet::on_jail(std::size_t index) {
  while (jails_[index]) {
    JailHandle& jail = *jails_[index];
    Message message;
    std::vector<UniqueFd> fds;
    switch (receive_message(jail.socket.get(), &message, &fds)) {
      case Received::kNothing: return;
      case Received::kClosed: return on_jail_gone(index, "the snippet's jail died");
      case Received::kMessage: break;
    }
    const bool preparing = jail.state == JailHandle::State::kPreparing;
    if (message.kind == MessageKind::kJailMade && fds.size() == 1 && !jail.zygote) {
      jail.zygote = std::move(fds[0]);
    } else if (message.kind == MessageKind::kParked && fds.size() == 3 && preparing) {
      on_parked(index, message, std::move(fds));
    } else if (message.kind == MessageKind::kExited && !preparing) {
      on_exited(index, message, fds);
    } else {
      failure_ = message.kind == MessageKind::kStartFailed
                     ? "a jail could not be made: " + describe(message.error)
                     : out_of_turn(message, fds.size(), preparing);
      return discard(index, infra(failure_));
    }
  }
}

void Fleet::on_jail_gone(std::size_t index, const std::string& why) {
  JailHandle& jail = *jails_[index];
  if (jail.slot && jail.state == JailHandle::State::kPreparing &&
      jail.slot->killed == KillReason::kNone && jail.dialogue == 0 &&
      ++jail.slot->job.attempts < kMaxAttempts) {  // its request was not sent to anybody
    jobs_->put_back(std::move(jail.slot->job));
    jail.slot.reset();
    --running_;
  }
  if (jail.state == JailHandle::State::kPreparing) failure_ = why;
  discard(index, infra(why));
}

void Fleet::on_parked(std::size_t index, const Message& parked, std::vector<UniqueFd> fds) {
  JailHandle& jail = *jails_[index];
  jail.child = std::move(fds[0]);
  jail.standard_output = std::move(fds[1]);
  jail.standard_error = std::move(fds[2]);
  // Here and not by their maker: a read that waits would stop us all.
  ::fcntl(jail.standard_output.get(), F_SETFL, O_NONBLOCK);
  ::fcntl(jail.standard_error.get(), F_SETFL, O_NONBLOCK);
  jail.state = JailHandle::State::kParked;
  deadlines_.clear(deadline_of_jail(index));
  if (counts_.layers == 0) counts_.layers = parked.layers;
  tiers_[jail.tier].succeeded();
  if (jail.slot) run(index);
}

void Fleet::on_exited(std::size_t index, const Message& exited,
                      const std::vector<UniqueFd>& files) {
  JailHandle& jail = *jails_[index];
  const Clock::time_point now = Clock::now();
  if (!exited.started) {  // told to the next request, or to who waits for the sandbox's start
    failure_ = "a snippet's process died before it started";
    if (exited.error) failure_ += ": " + describe(exited.error);
  }
  const bool left_traces = exited.started && !exited.pristine;
  if (left_traces) ++counts_.jails_discarded;
  jail.state = JailHandle::State::kPreparing;
  deadlines_.set(deadline_of_jail(index), now + config_.startup_timeout);
  if (jail.slot) {
    // All writers are dead, so what the pipes hold now is all there will ever be.
    jail.slot->drain(jail.standard_output.get(), jail.standard_error.get());
    Ending ending{.exited = exited, .killed_for_memory = exited.tree_out_of_memory};
    // Of every snippet: a kill that its main process survived is not the next one's.
    if (config_.cgroups) ending.killed_for_memory = killed_for_memory(index);
    Result result = conclude(*jail.slot, ending, now);
    const Job& job = jail.slot->job;
    const Request& opening = job.opening ? *job.opening : job.request;
    result.files = read_collected(opening.collect, exited.collected, files);
    finish(index, std::move(result));
  }
  if (jail.dialogue != 0) end_dialogue(index, "its process ended");
  unwatch_output(index);
  jail.standard_output.reset();
  jail.standard_error.reset();
  jail.so_far.reset();
  if (exited.pristine) return;
  // Not for a child that died before it ran anything: the next one might too, for ever.
  if (left_traces) replacements_.push_back(jail.tier);
  discard(index, Result{});
}

// Kills whatever is left of a jail; `result` is for who waits for it, if anybody does.
void Fleet::discard(std::size_t index, Result result) {
  JailHandle& jail = *jails_[index];
  if (jail.zygote) pidfd_signal(jail.zygote.get(), SIGKILL);
  const std::string why = result.error;
  if (jail.slot) finish(index, std::move(result));
  if (jail.dialogue != 0) end_dialogue(index, why);  // after it: steps are answered in order
  unwatch_output(index);
  unwatch(jail.socket.get());
  // Closing would not do where the host has forked: its children hold our end too.
  ::shutdown(jail.socket.get(), SHUT_RDWR);
  deadlines_.clear(deadline_of_jail(index));
  jails_[index].reset();
}

void Fleet::watch_output(std::size_t index) {
  JailHandle& jail = *jails_[index];
  jail.watched = true;
  if (jail.standard_output) watch(jail.standard_output.get(), Source::kOutput, index);
  if (jail.standard_error) watch(jail.standard_error.get(), Source::kErrorOutput, index);
  deadlines_.set(deadline_of_jail(index), next_deadline(*jail.slot));
}

// Of a snippet whose output is watched.
Clock::time_point Fleet::next_deadline(const Slot& slot) const {
  const Clock::time_point end = slot.deadline();
  if (slot.late) return end;
  const Clock::time_point next =
      slot.aged ? slot.is_late(config_.slot_keeping) : slot.ages(config_.slot_keeping);
  return std::min(next, end);
}

// Between a dialogue's steps nobody wants to know what it writes.
void Fleet::unwatch_output(std::size_t index) {
  JailHandle& jail = *jails_[index];
  if (!std::exchange(jail.watched, false)) return;
  if (jail.standard_output) unwatch(jail.standard_output.get());
  if (jail.standard_error) unwatch(jail.standard_error.get());
}

}  // namespace thor
