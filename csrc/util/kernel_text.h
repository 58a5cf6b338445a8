// The small text files of /proc, /sys and control groups.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thor {

// The whole text, read anew whatever the descriptor's position. Empty, with errno, on failure.
std::optional<std::string> read_text(int fd);
std::optional<std::string> read_text(const std::string& path);

// One write(2) to an existing file. False, with errno, on failure.
bool write_text(const std::string& path, std::string_view text);

// Views into `text`, which must live as long.
std::vector<std::string_view> split(std::string_view text, char separator);
std::vector<std::string_view> split(std::string&& text, char separator) = delete;
bool has_word(std::string_view text, char separator, std::string_view word);

// The decimal number that `text` starts with.
std::optional<std::uint64_t> to_number(std::string_view text);

}  // namespace thor
