// From a freshly cloned process to one that may run a stranger's code.
#pragma once

#include <linux/filter.h>

#include <string>
#include <vector>

#include "core/rlimits.h"
#include "core/setup_error.h"
#include "thor/execution.h"

namespace thor {

// The namespaces every snippet gets for itself.
unsigned long snippet_namespaces();

struct SnippetFds {
  int standard_input;
  int standard_output;
  int standard_error;
};

// What is decided once per zygote and used by each child.
struct ChildPlan {
  std::vector<sock_filter> filter;
  MemoryBaseline baseline;
  std::vector<std::string> shadowed;  // read-only paths that a private /tmp would hide
};

// In the child that is init of the new namespaces: ids, session, host name, mounts, descriptors.
// Descriptors other than the three and `keep` are closed.
SetupError prepare_init(const ChildPlan& plan, const SnippetFds& fds, int keep);

// In init's child, which runs the snippet: limits, then privileges, then system calls. After it
// nothing can be undone.
SetupError confine_snippet(const ChildPlan& plan, const Limits& limits);

}  // namespace thor
