// Which system calls a snippet gets and which it is refused, by number. A number in neither list is
// unknown; see seccomp_filter.h for what becomes of those, and for calls judged by an argument.
#pragma once

#include <cstdint>
#include <span>

namespace thor {

std::span<const std::uint32_t> allowed_syscalls();
std::span<const std::uint32_t> forbidden_syscalls();

}  // namespace thor
