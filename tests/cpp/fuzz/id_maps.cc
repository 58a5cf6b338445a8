// The id maps as the kernel will read them: what is written says what was asked. The input: which
// of the three files are there, then maps of three numbers.
#include "core/id_maps.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "input.h"

namespace {

namespace fs = std::filesystem;
constexpr std::array<const char*, 3> kFiles{"setgroups", "uid_map", "gid_map"};

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// As the kernel does: three numbers a line.
std::string expected_text(const std::vector<thor::IdMap>& maps, uid_t thor::IdMap::* outside) {
  std::ostringstream text;
  for (const thor::IdMap& map : maps) text << map.inside << ' ' << map.*outside << " 1\n";
  return text.str();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  static const fs::path directory =
      fs::temp_directory_path() / ("thor-fuzz-id-maps-" + std::to_string(::getpid()));
  fs::create_directories(directory);
  thor::Input input(data, size);
  const std::size_t missing = input.below(kFiles.size() + 1);
  for (std::size_t i = 0; i < kFiles.size(); ++i) {
    fs::remove(directory / kFiles[i]);
    if (i != missing) std::ofstream(directory / kFiles[i]).flush();
  }
  std::vector<thor::IdMap> maps;
  while (!input.empty()) {
    std::array<unsigned, 3> numbers{};
    const std::string_view bytes = input.take(sizeof(numbers));
    std::memcpy(numbers.data(), bytes.data(), bytes.size());
    maps.push_back({numbers[0], numbers[1], numbers[2]});
  }
  const thor::SetupError error = thor::write_id_maps(directory, maps);
  if (missing < kFiles.size()) {
    thor::require(error.step == thor::SetupStep::kIdMaps && error.error_number == ENOENT &&
                  error.index == static_cast<int>(missing));
  } else {
    thor::require(!error && text_of(directory / "setgroups") == "deny");
    thor::require(text_of(directory / "uid_map") == expected_text(maps, &thor::IdMap::outside_uid));
    thor::require(text_of(directory / "gid_map") == expected_text(maps, &thor::IdMap::outside_gid));
  }
  fs::remove_all(directory);
  return 0;
}
