// Starting a template's process: exec'd, never forked from a process with threads and secrets.
#pragma once

#include <string>
#include <vector>

#include "util/unique_fd.h"

namespace thor {

struct Spawned {
  UniqueFd control;  // our end of the SOCK_SEQPACKET pair
  UniqueFd pidfd;
  UniqueFd messages;  // memfd with what the process wrote to stdout and stderr
  int pid = -1;
};

// Starts argv[0] in a session of its own with `env` as its whole environment, stdin empty, its
// control socket as descriptor 3, and keeps it and its descendants to `cpus` unless that is empty.
// Throws std::system_error. The calling thread must live as long as the process may: the process
// asks to be killed with it.
Spawned spawn_template(const std::vector<std::string>& argv, const std::vector<std::string>& env,
                       const std::vector<int>& cpus);

// The first few kilobytes of what the process wrote, for an error message.
std::string read_messages(const Spawned& spawned);

}  // namespace thor
