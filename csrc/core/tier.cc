#include "core/tier.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <system_error>

#include "core/protocol.h"
#include "util/pidfd.h"

namespace thor {
namespace {

// A template that dies this often without having served anything in between will not get better.
constexpr int kMaxFailedStarts = 5;
constexpr std::chrono::milliseconds kStopGrace{2'000};  // thousands of times what an exit takes

// False if `timeout` passed with nothing to read (a pidfd is readable once the process is gone).
bool wait_readable(int fd, std::chrono::milliseconds timeout) {
  pollfd wait{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&wait, 1, static_cast<int>(timeout.count())) > 0;
}

}  // namespace

void Tier::start() {
  ++failed_starts_;
  process_ = spawn_template(config_.argv, env_, cpus_);
  state_ = State::kStarting;
}

bool Tier::listen(std::string* reason) {
  Message message;
  std::vector<UniqueFd> fds;
  const Received got = receive_message(process_.control.get(), &message, &fds);
  if (got == Received::kNothing) return true;
  if (got == Received::kMessage && message.kind == MessageKind::kReady) {
    state_ = State::kReady;
    return true;
  }
  *reason = "the sandbox's template '" + config_.name + "' " +
            (state_ == State::kStarting ? "did not start" : "died");
  const std::string said =
      got == Received::kMessage ? describe(message.error) : read_messages(process_);
  if (!said.empty()) *reason += ": " + said;
  return false;
}

UniqueFd Tier::make_jail(std::uint32_t uid_offset, int cgroup_procs) const {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) {
    throw std::system_error(errno, std::generic_category(), "socketpair");
  }
  UniqueFd ours(ends[0]);
  const UniqueFd theirs(ends[1]);
  ::fcntl(ours.get(), F_SETFL, O_NONBLOCK);
  const std::array<int, 2> fds{theirs.get(), cgroup_procs};
  const Message request{.kind = MessageKind::kMakeJail, .uid_offset = uid_offset};
  // If the template is gone, its own socket tells, and this one closes.
  send_message(process_.control.get(), request, {fds.data(), cgroup_procs < 0 ? 1U : 2U});
  return ours;
}

void Tier::stop() {
  state_ = failed_starts_ < kMaxFailedStarts ? State::kAbsent : State::kFailed;
  if (process_.pid < 0) return;
  // It exits when its socket closes, after its jails; killing is for one that is stuck.
  // Shut down, not only closed: a fork of the host may hold our end too.
  ::shutdown(process_.control.get(), SHUT_RDWR);
  process_.control.reset();
  if (!wait_readable(process_.pidfd.get(), kStopGrace)) {
    pidfd_signal(process_.pidfd.get(), SIGKILL);
  }
  int status = 0;
  while (::waitpid(process_.pid, &status, 0) < 0 && errno == EINTR) {
  }
  process_ = Spawned{};
}

}  // namespace thor
