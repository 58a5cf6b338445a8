// A Fleet whose templates, jails and guests say whatever the input makes them say, in any order.
// However they lie or die: every request is answered once, and no descriptor is left.
//
// The input is letters, each with its arguments (a digit is its value):
//   r T | q T | z T     template T is ready | speaks the message that follows | is gone
//   p J | e J S P C     jail J parks a child | says that it ended: status, pristine, collected
//   m J K F N D*        jail J sends message kind K with flags F and N descriptors
//   b J LEN BYTES       jail J sends these bytes
//   x J | y J           jail J is gone | its child's output is closed
//   w J N               its child writes N KiB
//   g J N | h J         its guest answers N times | hangs up
//   s T L | S T L       a snippet, with limits L | a large one, with stdin and files to collect
//   d L | D L           a dialogue opens and has a step | the last one has another
//   c N | o N           ticket N is cancelled | dialogue N is closed
//   t                   the fleet's turn; also after each of the above unless 'n' precedes
#include "core/fleet.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/handover.h"
#include "core/spawn.h"
#include "input.h"

namespace {

using thor::Message;
using thor::MessageKind;
using thor::require;
using thor::UniqueFd;

// The jail's side of what a template was asked to make.
struct Jail {
  UniqueFd socket;
  UniqueFd standard_output;
  UniqueFd guest;
};

struct World {
  std::vector<UniqueFd> templates;  // their ends
  std::vector<Jail> jails;
};
World* world = nullptr;

std::array<UniqueFd, 2> connected() {
  std::array<int, 2> ends{};
  require(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) ==
          0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

}  // namespace

// Takes the place of spawn.cc, which the linker then leaves out: no process, only its socket.
namespace thor {

Spawned spawn_template(const std::vector<std::string>& /*argv*/,
                       const std::vector<std::string>& /*env*/, const std::vector<int>& /*cpus*/) {
  auto [ours, theirs] = connected();
  world->templates.push_back(std::move(theirs));
  Spawned out;
  out.control = std::move(ours);
  return out;
}

std::string read_messages(const Spawned& /*spawned*/) { return "last words"; }

}  // namespace thor

namespace {

class Play {
 public:
  Play(thor::Input* input, World* stage)
      : input_(*input),
        world_(*stage),
        wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        config_{.tiers = {{"light", {"light"}}, {"heavy", {"heavy"}}}, .slots = 2},
        jobs_(8, 2),
        sink_(std::make_shared<thor::CompletionQueue>()) {
    config_.max_dialogues = 2;
    jobs_.set_state(thor::JobQueue::State::kServing);
  }

  void run() {
    {
      thor::Fleet fleet(config_, wake_.get(), &jobs_);
      bool serving = true;
      while (serving && !input_.empty()) {
        unsigned char what = input_.byte();
        const bool turn = what != 'n';
        if (!turn) what = input_.byte();
        act(what);
        if (turn) serving = take_turn(&fleet);
      }
    }
    for (const thor::Job& job : jobs_.take_all()) jobs_.answer(job, thor::infra("closed"));
    std::map<std::uint64_t, int> answers;
    for (const thor::Completion& done : sink_->wait(std::chrono::milliseconds(0))) {
      ++answers[done.ticket];
      require(done.result.status != thor::Status::kInfra || !done.result.error.empty());
    }
    require(answers.size() == submitted_);
    for (const auto& [ticket, times] : answers) require(times == 1);
    require(jobs_.stats().counts.running == 0 && jobs_.stats().counts.jails == 0);
  }

 private:
  bool take_turn(thor::Fleet* fleet) {
    ::eventfd_write(wake_.get(), 1);  // or it would wait for something to happen
    std::string reason;
    const bool serving = fleet->turn(&reason);
    require(serving != !reason.empty());
    require(jobs_.stats().counts.running <= 2 * config_.slots);
    for (const UniqueFd& end : world_.templates) take_jails(end);
    for (Jail& jail : world_.jails) take_run(&jail);
    return serving;
  }

  void take_jails(const UniqueFd& end) {
    Message request;
    for (std::vector<UniqueFd> fds;
         end && thor::receive_message(end.get(), &request, &fds) == thor::Received::kMessage;
         fds.clear()) {
      require(request.kind == MessageKind::kMakeJail && fds.size() == 1);
      world_.jails.push_back({.socket = std::move(fds[0])});
    }
  }

  static void take_run(Jail* jail) {
    Message request;
    std::vector<UniqueFd> fds;
    std::string payload;
    if (!jail->socket) return;
    ::fcntl(jail->socket.get(), F_SETFL, O_NONBLOCK);
    if (thor::receive_message(jail->socket.get(), &request, &fds, &payload) !=
        thor::Received::kMessage) {
      return;
    }
    const std::size_t expected = std::size_t{request.payload_is_file} +
                                 std::size_t{request.has_stdin} + std::size_t{request.has_dialogue};
    require(request.kind == MessageKind::kRun && fds.size() == expected);
    if (request.has_dialogue) jail->guest = std::move(fds.back());
  }

  // The templates and jails of which `act` speaks; null if there are none.
  UniqueFd* some_template() {
    const std::size_t index = input_.below(8);
    return index < world_.templates.size() ? &world_.templates[index] : nullptr;
  }
  Jail* some_jail() {
    const std::size_t index = input_.below(8);
    return index < world_.jails.size() && world_.jails[index].socket ? &world_.jails[index]
                                                                     : nullptr;
  }

  void act(unsigned char what) {
    if (std::strchr("rqz", what) != nullptr) return act_template(what);
    if (std::strchr("pembxywgh", what) != nullptr) return act_jail(what);
    try {
      act_caller(what);
    } catch (const thor::QueueFull&) {
      return;
    } catch (const std::logic_error&) {  // no such dialogue
      return;
    }
  }

  void act_template(unsigned char what) {
    UniqueFd* end = some_template();
    if (end == nullptr || !*end) return;
    if (what == 'z') {
      end->reset();
    } else if (what == 'r') {
      thor::send_message(end->get(), {.kind = MessageKind::kReady});
    } else {
      thor::send_message(end->get(), message());
    }
  }

  void act_jail(unsigned char what) {
    Jail* jail = some_jail();
    if (jail == nullptr) return;
    switch (what) {
      case 'p': return park(jail);
      case 'e': return end(*jail);
      case 'm': return speak(*jail);
      case 'b': {
        const std::string_view bytes = input_.take(input_.byte());
        ::send(jail->socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        return;
      }
      case 'x': return jail->socket.reset();
      case 'y': return jail->standard_output.reset();
      case 'w': {
        const std::string text(input_.below(64) << 10, 'x');
        if (jail->standard_output) {
          static_cast<void>(::write(jail->standard_output.get(), text.data(), text.size()));
        }
        return;
      }
      case 'g': {
        for (std::size_t n = input_.below(4); n > 0 && jail->guest; --n) {
          ::send(jail->guest.get(), "[]", 2, MSG_NOSIGNAL | MSG_DONTWAIT);
        }
        return;
      }
      default: return jail->guest.reset();
    }
  }

  static void park(Jail* jail) {
    std::array<int, 2> ends{};
    require(::pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK) == 0);
    const UniqueFd read_end(ends[0]);
    jail->standard_output.reset(ends[1]);
    const UniqueFd child = thor::input_file("no process");
    const std::array<int, 3> fds{child.get(), read_end.get(), read_end.get()};
    thor::send_message(jail->socket.get(), {.kind = MessageKind::kParked, .layers = 1}, fds);
  }

  void end(const Jail& jail) {
    Message exited{.kind = MessageKind::kExited, .started = true};
    exited.snippet_status = static_cast<std::int32_t>(input_.byte());
    exited.pristine = input_.below(2) == 1;
    exited.collected = input_.below(4);
    const UniqueFd file = thor::input_file("content");
    const std::array<int, 2> fds{file.get(), file.get()};
    thor::send_message(jail.socket.get(), exited, {fds.data(), exited.collected % 3});
  }

  Message message() {
    Message out{.kind = static_cast<MessageKind>(input_.below(10))};
    const unsigned char flags = input_.byte();
    out.started = (flags & 1U) != 0;
    out.pristine = (flags & 2U) != 0;
    out.out_of_memory = (flags & 4U) != 0;
    out.tree_out_of_memory = (flags & 8U) != 0;
    if ((flags & 16U) != 0) out.error = {thor::SetupStep::kProc, flags, flags};
    if ((flags & 32U) != 0) {  // what no compiler would write: all bytes the same
      std::memset(static_cast<void*>(&out), flags, sizeof(out));
      out.kind = MessageKind::kExited;
    }
    return out;
  }

  void speak(const Jail& jail) {
    const Message said = message();
    std::vector<UniqueFd> owned;
    for (std::size_t n = input_.below(5); n > 0; --n) owned.push_back(some_descriptor());
    std::vector<int> fds;
    for (const UniqueFd& fd : owned) fds.push_back(fd.get());
    thor::send_message(jail.socket.get(), said, fds);
  }

  UniqueFd some_descriptor() {
    switch (input_.below(5)) {
      case 0: return thor::input_file("some text");
      case 1: return UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
      case 2: return UniqueFd(::open("/", O_PATH | O_CLOEXEC));
      case 3: return std::move(connected()[0]);
      default: {  // a pipe that blocks who reads it
        std::array<int, 2> ends{};
        require(::pipe2(ends.data(), O_CLOEXEC) == 0);
        world_.jails[0].standard_output.reset(ends[1]);
        return UniqueFd(ends[0]);
      }
    }
  }

  thor::Limits limits() {
    thor::Limits out;
    const std::size_t choice = input_.below(4);
    if (choice % 2 == 1) out.timeout = std::chrono::nanoseconds(1);  // over before it begins
    out.max_output_bytes = choice / 2 == 1 ? 1 : 1'000;
    return out;
  }

  void act_caller(unsigned char what) {
    switch (what) {
      case 's':
      case 'S': {
        thor::Request request{.payload = "small", .tier = tier(), .priority = 1};
        request.limits = limits();
        if (what == 'S') {
          request.payload.assign(thor::kMaxInlinePayload, 'x');
          request.stdin_data = "input";
          request.collect = {"a", "b"};
        }
        jobs_.submit(std::move(request), sink_);
        ++submitted_;
        return;
      }
      case 'd': {
        thor::Request opening{.payload = "talk", .limits = {}};
        opening.accumulate = dialogues_ % 2 == 1;
        dialogues_ = jobs_.open_dialogue(std::move(opening));
        return step(dialogues_);
      }
      case 'D': return step(dialogues_);
      case 'c': return jobs_.cancel(input_.below(8));
      case 'o': return jobs_.close_dialogue(input_.below(4));
      default: return;
    }
  }

  std::uint32_t tier() { return static_cast<std::uint32_t>(input_.below(2)); }

  // All steps of a dialogue ask for the same tier.
  void step(std::uint64_t dialogue) {
    const auto wanted = static_cast<std::uint32_t>(dialogue % 2);
    jobs_.submit_step(dialogue, "step", limits(), wanted, sink_);
    ++submitted_;
  }

  thor::Input& input_;
  World& world_;
  UniqueFd wake_;
  thor::OrchestratorConfig config_;
  thor::JobQueue jobs_;
  std::shared_ptr<thor::CompletionQueue> sink_;
  std::size_t submitted_ = 0;
  std::uint64_t dialogues_ = 0;
};

int open_descriptors() {
  int count = 0;
  for (int fd = 0; fd < 100; ++fd) count += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
  return count;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  ::signal(SIGPIPE, SIG_IGN);  // ours, when a fleet has closed its end
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const int before = open_descriptors();
  {
    thor::Input input(data, size);
    World stage;
    world = &stage;
    Play(&input, &stage).run();
  }
  require(open_descriptors() == before);
  return 0;
}
