// Names of layers, as callers and reports spell them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "thor/zygote.h"

namespace thor {

// Throws std::invalid_argument for a name that is none.
Layer layer_of(const std::string& name);

std::vector<std::string> layer_names(std::uint32_t bits);

}  // namespace thor
