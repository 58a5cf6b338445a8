// The warm interpreter's memory, laid out so that forking it is cheap.
#pragma once

#include <cstddef>

namespace thor {

// Backs this process's private anonymous memory by huge pages where it can: a fork then copies one
// entry instead of 512. Returns the bytes collapsed; 0 where the kernel cannot (before Linux 6.1).
std::size_t collapse_heap();

}  // namespace thor
