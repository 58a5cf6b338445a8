// What this host grants of the layers that the sandbox stands on.
#pragma once

#include <string>
#include <vector>

namespace thor {

struct ProbedLayer {
  std::string name;
  bool granted = false;
  std::string detail;  // a refusal's call and errno; of what is granted, what a reader should know
};

// Tries each layer for real, in forked children, the way a jail does: inside a fresh user
// namespace, as root under another uid. The process itself stays as it was. Throws
// std::runtime_error if it has more than one thread, because forks of it could hang.
std::vector<ProbedLayer> probe_host();

}  // namespace thor
