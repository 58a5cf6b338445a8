// What Fleet does with requests: snippets, and the steps of dialogues.
#include <signal.h>

#include <algorithm>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "core/fleet.h"
#include "util/pidfd.h"

namespace thor {
namespace {

// For a zygote to empty its namespace, on a machine whose CPUs are taken or with gigabytes to free:
// given up, the snippet's usage and files are lost.
constexpr std::chrono::milliseconds kKillGrace{2'000};
// Pipes are watched once a snippet has run this long: most are over by then, and what they wrote
// fits a pipe.
constexpr std::chrono::milliseconds kUnwatched{10};
// After a look at them they are left alone: whoever prints line by line would wake us for each,
// which costs the writer more than the line does. A pipe takes what is written in so short a time.
constexpr std::chrono::milliseconds kRest{1};
// Beyond a snippet's own limit its group may hold what it copied of the warm interpreter, page
// tables and pipes. The limit of each process is the first wall.
constexpr std::uint64_t kGroupSlack = std::uint64_t{64} << 20;

}  // namespace

// Before anybody asks for it, as far as snippets at work can need it.
void Fleet::replace_jail(std::size_t tier) {
  const auto jails = std::ranges::count_if(jails_, [tier](const auto& jail) {
    return jail && jail->tier == tier && jail->dialogue == 0;
  });
  if (tiers_[tier].state() != Tier::State::kReady || std::cmp_greater_equal(jails, config_.slots)) {
    return;
  }
  try {
    make_jail(tier);
  } catch (const std::system_error& e) {  // out of descriptors or memory: whoever needs one is told
    failure_ = std::string("a jail could not be made: ") + e.what();
  }
}

// Most snippets are over in milliseconds; the few that are not, endless loops among them, would
// stop all others for the whole of their limit. So up to as many as there are slots run beside
// these; and once a quarter of its time is over, each makes room for one more.
bool Fleet::has_room() const {
  const std::size_t beside = std::min<std::size_t>(aged_, config_.slots);
  const std::size_t more = std::min<std::size_t>(late_, config_.slots);
  return running_ < config_.slots + beside + more;
}

void Fleet::serve_queued() {
  for (const std::size_t tier : std::exchange(replacements_, {})) replace_jail(tier);
  TierMask ready = 0;
  for (std::size_t i = 0; i < tiers_.size(); ++i) {
    if (tiers_[i].state() == Tier::State::kReady) ready |= TierMask{1} << i;
  }
  while (has_room()) {
    std::optional<Job> job = jobs_->next(ready);
    if (!job) return;
    if (job->dialogue != 0) {
      serve_step(std::move(*job));
      continue;
    }
    try {
      const std::size_t index = jail_for(job->request.tier);  // before the job is moved: it throws
      bind(index, std::move(*job));
    } catch (const std::system_error& e) {  // out of descriptors or memory
      jobs_->answer(*job, infra(std::string("preparing a snippet: ") + e.what()));
    }
  }
}

void Fleet::serve_step(Job job) {
  const auto [found, first] = dialogues_.try_emplace(job.dialogue);
  Dialogue& dialogue = found->second;
  if (!dialogue.ended.empty()) {
    return jobs_->answer(job, infra("the dialogue is over: " + dialogue.ended));
  }
  try {
    if (first) {
      dialogue.jail = jail_for(job.request.tier);
      jails_[dialogue.jail]->dialogue = job.dialogue;
    }
  } catch (const std::system_error& e) {
    dialogue.ended = std::string("preparing it failed: ") + e.what();
    return jobs_->answer(job, infra(dialogue.ended));
  }
  if (jails_[dialogue.jail]->slot) return dialogue.waiting.push_back(std::move(job));
  bind(dialogue.jail, std::move(job));
}

void Fleet::bind(std::size_t index, Job job) {
  JailHandle& jail = *jails_[index];
  jail.slot.emplace(std::move(job));
  if (jail.so_far) jail.slot->output = *std::exchange(jail.so_far, std::nullopt);
  ++running_;
  if (jail.state == JailHandle::State::kParked) return run(index);
  if (jail.state == JailHandle::State::kRunning) ask(index);  // a dialogue's next step
}

void Fleet::run(std::size_t index) {
  JailHandle& jail = *jails_[index];
  Slot& slot = *jail.slot;
  if (slot.killed != KillReason::kNone) {  // cancelled while the jail was prepared
    const bool talks = jail.dialogue != 0;
    finish(index, infra("cancelled by the caller"));
    if (talks) discard(index, infra("cancelled by the caller"));
    return;
  }
  try {
    const Request& opening = slot.job.opening ? *slot.job.opening : slot.job.request;
    if (Group* group = group_of(index)) {
      const std::uint64_t limit = opening.limits.memory_bytes + kGroupSlack;
      if (std::exchange(group->limit, limit) != limit) {
        const CgroupError error = group->cgroup.set_memory_limit(limit);
        if (error) return discard(index, infra(describe(error)));
      }
    }
    send_run(&jail, opening);
    if (jail.dialogue != 0) {
      jail.expires = Clock::now() + opening.life;
      watch(jail.dialogue_socket.get(), Source::kDialogue, index);
      return ask(index);
    }
    slot.started = Clock::now();
    deadlines_.set(deadline_of_jail(index), std::min(slot.started + kUnwatched, slot.deadline()));
  } catch (const std::system_error& e) {
    discard(index, infra(std::string("preparing a snippet: ") + e.what()));
  }
}

// A step of a dialogue whose process is there.
void Fleet::ask(std::size_t index) {
  JailHandle& jail = *jails_[index];
  try {
    send_step(jail, jail.slot->job.request.payload);
    jail.slot->started = Clock::now();
    watch_output(index);
  } catch (const std::system_error& e) {
    discard(index, infra(std::string("preparing a step: ") + e.what()));
  }
}

void Fleet::on_output(std::size_t index, UniqueFd JailHandle::* stream, bool hung_up) {
  JailHandle& jail = *jails_[index];
  if (!jail.slot || !jail.watched) return;  // of a child that went earlier in this turn
  if (!jail.slot->drain(jail.standard_output.get(), jail.standard_error.get())) {
    unwatch_output(index);  // what is left in the pipe would wake us until it is gone
    return kill(index, KillReason::kOutput);
  }
  if (hung_up) {
    unwatch((jail.*stream).get());
    (jail.*stream).reset();
  }
  unwatch_output(index);
  if (jail.slot->killed != KillReason::kNone) return;  // its end is near, and has a deadline
  deadlines_.set(deadline_of_jail(index),
                 std::min(Clock::now() + kRest, next_deadline(*jail.slot)));
}

void Fleet::on_reply(std::size_t index) {
  JailHandle& jail = *jails_[index];
  std::string text;
  switch (receive_reply(jail, &text)) {
    case Reply::kNothing: return;
    case Reply::kClosed: return hang_up(index);  // its end will follow
    case Reply::kReply: break;
  }
  // It could keep us busy, at nobody's expense.
  if (!jail.slot) return discard(index, infra("it spoke without being asked"));
  if (jail.slot->killed != KillReason::kNone) return;  // too late
  jail.slot->drain(jail.standard_output.get(), jail.standard_error.get());
  unwatch_output(index);
  deadlines_.set(deadline_of_jail(index), jail.expires);
  const bool accumulate = jail.slot->job.opening->accumulate;
  Result result = conclude_step(&*jail.slot, std::move(text), accumulate, Clock::now());
  if (accumulate) jail.so_far = std::move(jail.slot->output);
  finish(index, std::move(result));
  Dialogue& dialogue = dialogues_.at(jail.dialogue);
  if (dialogue.waiting.empty()) return;
  Job next = std::move(dialogue.waiting.front());
  dialogue.waiting.pop_front();
  bind(index, std::move(next));
}

void Fleet::hang_up(std::size_t index) {
  UniqueFd& socket = jails_[index]->dialogue_socket;
  if (socket) unwatch(socket.get());
  socket.reset();
}

void Fleet::kill(std::size_t index, KillReason reason) {
  JailHandle& jail = *jails_[index];
  if (jail.slot->killed != KillReason::kNone) return;
  jail.slot->killed = reason;
  if (jail.state != JailHandle::State::kRunning) return;  // run() will see it
  pidfd_signal(jail.child.get(), SIGKILL);
  deadlines_.set(deadline_of_jail(index), Clock::now() + kKillGrace);
}

void Fleet::finish(std::size_t index, Result result) {
  const std::optional<Slot> slot = std::exchange(jails_[index]->slot, std::nullopt);
  --running_;
  if (slot->aged) --aged_;
  if (slot->late) --late_;
  publish();  // who sees the result sees the counts that go with it
  jobs_->answer(slot->job, std::move(result));
}

void Fleet::end_dialogue(std::size_t index, const std::string& why) {
  JailHandle& jail = *jails_[index];
  const auto found = dialogues_.find(std::exchange(jail.dialogue, 0));
  hang_up(index);
  if (found == dialogues_.end()) return;  // closed by its owner
  found->second.ended = why.empty() ? "its process ended" : why;
  for (const Job& job : std::exchange(found->second.waiting, {})) {
    jobs_->answer(job, infra("the dialogue is over: " + found->second.ended));
  }
}

void Fleet::close_dialogue(std::uint64_t id) {
  const auto node = dialogues_.extract(id);
  if (node.empty()) return;  // it never had a step
  for (const Job& job : node.mapped().waiting) jobs_->answer(job, infra("the dialogue was closed"));
  if (node.mapped().ended.empty()) discard(node.mapped().jail, infra("the dialogue was closed"));
}

}  // namespace thor
