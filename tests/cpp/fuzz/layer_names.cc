// Names of layers: each is known or refused, and those of a set of bits lead back to them.
#include <stdexcept>
#include <string>

#include "core/layers.h"
#include "input.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  thor::Input input(data, size);
  std::uint32_t asked = 0;
  while (!input.empty()) {
    const std::string name(input.until('\n'));
    try {
      const thor::Layer layer = thor::layer_of(name);
      thor::require(thor::layer_names(thor::bit(layer)) == std::vector<std::string>{name});
      asked |= thor::bit(layer);
    } catch (const std::invalid_argument& e) {
      const std::string got = "layer is '" + name + "', expected";
      thor::require(std::string_view(e.what()).starts_with(got.c_str()));  // it ends at a NUL
    }
  }
  std::uint32_t back = 0;
  for (const std::string& name : thor::layer_names(asked)) back |= thor::bit(thor::layer_of(name));
  thor::require(back == asked);
  return 0;
}
