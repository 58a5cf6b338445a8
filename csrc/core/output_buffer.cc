#include "core/output_buffer.h"

#include <algorithm>

namespace thor {

OutputBuffer::OutputBuffer(std::size_t capacity)
    : capacity_(capacity), head_capacity_(capacity - capacity / 2) {}

void OutputBuffer::append(std::string_view data) {
  total_ += data.size();
  const std::size_t to_head = std::min(data.size(), head_capacity_ - head_.size());
  head_.append(data.substr(0, to_head));
  data.remove_prefix(to_head);

  const std::size_t tail_capacity = capacity_ - head_capacity_;
  if (data.size() > tail_capacity) data.remove_prefix(data.size() - tail_capacity);
  const std::size_t grow = std::min(data.size(), tail_capacity - tail_.size());
  tail_.append(data.substr(0, grow));
  data.remove_prefix(grow);
  while (!data.empty()) {
    const std::size_t n = std::min(data.size(), tail_capacity - tail_start_);
    std::copy_n(data.data(), n, tail_.data() + tail_start_);
    tail_start_ = (tail_start_ + n) % tail_capacity;
    data.remove_prefix(n);
  }
}

std::string OutputBuffer::text() const {
  std::string out = head_;
  if (truncated()) out += "\n... [" + std::to_string(total_ - capacity_) + " bytes omitted] ...\n";
  out.append(tail_, tail_start_);
  out.append(tail_, 0, tail_start_);
  return out;
}

}  // namespace thor
