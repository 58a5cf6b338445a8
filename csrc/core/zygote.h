// A jail's zygote: pid 1 in there, one snippet at a time.
#pragma once

#include <cstdint>

#include "core/jail.h"
#include "core/mounts.h"
#include "thor/zygote.h"

namespace thor {

// Serves snippets on kControlFd until the other end closes or the jail is no longer pristine.
[[noreturn]] void serve_snippets(const JailPlan& plan, std::uint32_t layers, JailFiles files,
                                 const GuestHooks& hooks);

}  // namespace thor
