// The zygote of the C++ tests: serves requests whose payload is one command.
//
//   print TEXT | echo-stdin | exit N | spin | sleep-ignoring-term | flood BYTES | abort
//   oom | orphan | syscall-mount | getpid
//
// "STUB_FAIL=1" in the environment makes it die before it serves.
#include <signal.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "core/protocol.h"
#include "thor/zygote.h"

namespace {

void write_all(const std::string& text) {
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(STDOUT_FILENO, text.data() + done, text.size() - done);
    if (n <= 0) ::_exit(99);
    done += static_cast<std::size_t>(n);
  }
}

[[noreturn]] void spin() {
  for (;;) static_cast<void>(::getppid());  // burns CPU and cannot be optimised away
}

int echo_stdin() {
  std::string text;
  char c = 0;
  while (::read(STDIN_FILENO, &c, 1) == 1) text.push_back(c);
  write_all(text);
  return 0;
}

int run(void* /*context*/, const std::string& payload, volatile bool* out_of_memory) {
  const std::size_t space = payload.find(' ');
  const std::string command = payload.substr(0, space);
  const std::string argument = space == std::string::npos ? "" : payload.substr(space + 1);
  if (command == "print") {
    write_all(argument);
    return 0;
  }
  if (command == "echo-stdin") return echo_stdin();
  if (command == "exit") return std::stoi(argument);
  if (command == "spin") spin();
  if (command == "sleep-ignoring-term") {
    ::signal(SIGTERM, SIG_IGN);
    for (;;) ::pause();
  }
  if (command == "flood") {
    const std::string block(4096, 'x');
    for (long left = std::stol(argument); left > 0; left -= 4096) write_all(block);
    return 0;
  }
  if (command == "abort") std::abort();
  if (command == "oom") {
    *out_of_memory = true;
    return 1;
  }
  if (command == "orphan") {  // holds stdout open for ever, unless it is killed with us
    if (::fork() == 0) {
      for (;;) ::pause();
    }
    write_all("left");
    return 0;
  }
  if (command == "syscall-mount") {
    return ::mount("tmpfs", "/tmp", "tmpfs", 0, nullptr) != 0 && errno == EPERM ? 0 : 1;
  }
  if (command == "getpid") {
    write_all(std::to_string(::getpid()) + " " + std::to_string(::getuid()));
    return 0;
  }
  return 98;
}

}  // namespace

int main() {
  if (std::getenv("STUB_FAIL") != nullptr) {
    std::cerr << "stub refuses to start\n";
    return 1;
  }
  std::vector<std::string> visible;
  for (const char* path : {"/usr", "/lib", "/lib64"}) {
    if (std::filesystem::exists(path)) visible.emplace_back(path);
  }
  const auto nothing = [](void* /*context*/) {};
  thor::serve_zygote(thor::kControlFd, {.readonly_paths = visible},
                     {.context = nullptr,
                      .before_fork = nothing,
                      .after_fork_parent = nothing,
                      .after_fork_child = nothing,
                      .run = &run});
}
