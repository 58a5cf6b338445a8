// OutputBuffer against a model that keeps everything. First byte: capacity; then chunks, each
// behind its length.
#include "core/output_buffer.h"

#include <cstdlib>
#include <string>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  std::string_view input(reinterpret_cast<const char*>(data), size);
  if (input.empty()) return 0;
  const std::size_t capacity = data[0];
  thor::OutputBuffer buffer(capacity);
  std::string all;
  for (input.remove_prefix(1); !input.empty();) {
    const auto length = static_cast<unsigned char>(input[0]);
    input.remove_prefix(1);
    const std::string_view chunk = input.substr(0, length);
    buffer.append(chunk);
    all += chunk;
    input.remove_prefix(chunk.size());
  }
  std::string expected = all;
  if (all.size() > capacity) {
    const std::size_t head = capacity - capacity / 2;
    expected = all.substr(0, head) + "\n... [" + std::to_string(all.size() - capacity) +
               " bytes omitted] ...\n" + all.substr(all.size() - capacity / 2);
  }
  if (buffer.text() != expected || buffer.total() != all.size()) std::abort();
  return 0;
}
