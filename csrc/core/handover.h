// The descriptors a snippet gets from us.
#pragma once

#include <string>

#include "util/unique_fd.h"

namespace thor {

// `data` as a file to read from its start. Sealed: the snippet could otherwise grow it, and no
// limit counts that memory. Throws std::system_error.
UniqueFd input_file(const std::string& data);

}  // namespace thor
