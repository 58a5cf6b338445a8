// The orchestrator's half of collecting: descriptors of any kind, and bits that need not match
// them, against a model. The input: paths (a letter each) up to a newline, four bytes of bits, then
// a letter for each descriptor and its size.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/collect.h"
#include "core/protocol.h"
#include "input.h"

namespace {

struct Given {
  thor::UniqueFd fd;
  std::optional<std::string> content;  // none: it cannot be read as a file
};

Given given(thor::Input* input) {
  const unsigned char kind = input->byte();
  const std::size_t size = input->byte();
  if (kind == 'p') {  // a pipe, whose end nobody writes to
    std::array<int, 2> ends{};
    thor::require(::pipe(ends.data()) == 0);
    ::close(ends[1]);
    return {thor::UniqueFd(ends[0]), ""};
  }
  if (kind == 'd') return {thor::UniqueFd(::open("/dev/zero", O_RDONLY)), ""};
  if (kind == 'o') return {thor::UniqueFd(::open("/proc/self/status", O_PATH)), ""};
  if (kind == 'w') {
    thor::UniqueFd file(::memfd_create("fuzz", 0));
    thor::require(::ftruncate(file.get(), 1) == 0);
    const std::string again = "/proc/self/fd/" + std::to_string(file.get());
    return {thor::UniqueFd(::open(again.c_str(), O_WRONLY)), std::nullopt};
  }
  thor::UniqueFd file(::memfd_create("fuzz", 0));
  // 'l': nine of these can be more than may be handed over.
  const std::size_t length = kind == 'l' ? size << 14 : size;
  thor::require(::ftruncate(file.get(), static_cast<off_t>(length)) == 0);
  return {std::move(file), std::string(length, '\0')};
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  thor::Input input(data, size);
  std::vector<std::string> paths;
  for (const char letter : input.until('\n')) paths.emplace_back(1, letter);
  std::uint64_t found = 0;
  const std::string_view bits = input.take(sizeof(found));
  std::memcpy(&found, bits.data(), bits.size());
  std::vector<thor::UniqueFd> files;
  std::vector<std::optional<std::string>> contents;
  while (!input.empty() && files.size() < thor::kMaxFds) {
    Given one = given(&input);
    files.push_back(std::move(one.fd));
    contents.push_back(std::move(one.content));
  }
  std::map<std::string, std::string> expected;
  std::uint64_t left = thor::kMaxCollectedSize;
  std::size_t next = 0;
  for (std::size_t i = 0; i < paths.size() && i < thor::kMaxCollected; ++i) {
    if ((found >> i & 1U) == 0 || next == contents.size()) continue;
    const std::optional<std::string>& content = contents[next++];
    if (!content || content->size() > left) continue;
    left -= content->size();
    expected.emplace(paths[i], *content);
  }
  thor::require(thor::read_collected(paths, found, files) == expected);
  return 0;
}
