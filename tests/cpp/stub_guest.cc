// The template of the C++ tests: serves requests whose payload is one command.
//
//   print TEXT | echo-stdin | exit N | spin | sleep-ignoring-term | flood BYTES | flood-by-two
//   abort | signal N | oom | getpid | fds | open-many | write FILE TEXT | touch-and-remove
//   orphans N | grow MIB | grow-in-children N MIB |
//   survive-children N MIB | shared-memory MIB | litter | syscall-mount | close-output
//   dialogue: answers each step "say TEXT" with TEXT, obeys other commands and answers their code
//
// Its environment: STUB_REFUSE=NAME makes the tier of that name (argv[1]) die before it serves,
// STUB_HANG=NAME makes it wait for ever, STUB_THREAD makes it multi-threaded, STUB_READONLY adds a
// read-only path, or takes them all away ("none"), STUB_LAYERS=0 requires no optional layer,
// STUB_CGROUP is the pool's directory, STUB_DENY makes system calls fail (see deny()).
// STUB_REFRESH is what each zygote does before it parks a child: die | end-early | park-twice |
// babble | unlikely-flags | pipes-that-wait.
#include <dirent.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "core/protocol.h"
#include "thor/zygote.h"

namespace {

constexpr int kUnknownCommand = 98;

void write_all(const std::string& text) {
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::write(STDOUT_FILENO, text.data() + done, text.size() - done);
    if (n <= 0) ::_exit(99);
    done += static_cast<std::size_t>(n);
  }
}

[[noreturn]] void sleep_on() {
  for (;;) ::pause();
}

[[noreturn]] void spin() {
  for (;;) static_cast<void>(::getppid());  // burns CPU and cannot be optimised away
}

std::string read_all(int fd) {
  std::string text;
  std::array<char, 4096> chunk{};
  for (ssize_t n = 0; (n = ::read(fd, chunk.data(), chunk.size())) > 0;) {
    text.append(chunk.data(), static_cast<std::size_t>(n));
  }
  return text;
}

// Holds private memory, or memory that children share, until the process ends.
bool hold(long mebibytes, int sharing) {
  return ::mmap(nullptr, static_cast<std::size_t>(mebibytes) << 20, PROT_READ | PROT_WRITE,
                sharing | MAP_ANONYMOUS | MAP_POPULATE, -1, 0) != MAP_FAILED;
}

// Fails as soon as one of them is gone.
int grow_in_children(long children, long mebibytes) {
  for (long i = 0; i < children; ++i) {
    if (::fork() == 0) {
      if (!hold(mebibytes, MAP_PRIVATE)) ::_exit(1);
      sleep_on();
    }
  }
  ::wait(nullptr);
  return 1;
}

int write_file(std::istringstream& arguments) {
  std::string name;
  std::string text;
  arguments >> name >> text;
  const int fd = ::open(name.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, S_IRUSR | S_IWUSR);
  const auto size = static_cast<ssize_t>(text.size());
  return fd >= 0 && ::write(fd, text.data(), text.size()) == size ? 0 : 1;
}

// Waits for children of which some are killed for memory, and ends as if nothing had been.
int survive_children(long children, long mebibytes) {
  for (long i = 0; i < children; ++i) {
    if (::fork() == 0) {
      hold(mebibytes, MAP_PRIVATE);
      ::usleep(300'000);
      ::_exit(0);
    }
  }
  while (::wait(nullptr) > 0) {
  }
  return 0;
}

// Files of all kinds below the working directory.
int litter() {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::create_directories("deep/er", error);
  fs::create_symlink("/etc/passwd", "link", error);
  fs::create_symlink("deep", "linked-directory", error);
  if (::mkfifo("pipe", S_IRUSR | S_IWUSR) != 0) return 1;
  for (const char* file : {"deep/er/file x", "file y", "private z", "empty "}) {
    std::istringstream arguments(file);
    if (write_file(arguments) != 0) return 1;
  }
  const int large = ::open("large", O_WRONLY | O_CREAT | O_CLOEXEC, S_IRUSR);
  if (::ftruncate(large, 33L << 20) != 0) return 1;  // more than may be handed over
  return ::chmod("private", 0) != 0 || error ? 1 : 0;
}

// Descriptors that are open, by number; that of the directory being read is not among them.
std::string open_descriptors() {
  std::string out;
  for (int fd = 0; fd < 256; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0) out += std::to_string(fd) + " ";
  }
  return out;
}

int open_many() {
  int opened = 0;
  while (::open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0) ++opened;
  write_all(std::to_string(opened));
  return errno == EMFILE ? 0 : 1;
}

// What its writer cannot do alone: keep a pipe from ever being empty while it is read.
int flood_by_two() {
  const std::string block(4096, 'x');
  static_cast<void>(::fork());
  for (;;) write_all(block);
}

int orphans(long count) {  // which hold stdout open for ever, unless they are killed with us
  for (long i = 0; i < count; ++i) {
    if (::fork() != 0) continue;
    ::setsid();
    ::signal(SIGTERM, SIG_IGN);
    if (::fork() == 0) sleep_on();
    sleep_on();
  }
  write_all("left");
  return 0;
}

int sleep_ignoring_term() {
  ::signal(SIGTERM, SIG_IGN);
  sleep_on();
}

int touch_and_remove() {
  std::istringstream arguments("trace x");
  return write_file(arguments) != 0 || ::unlink("trace") != 0 ? 1 : 0;
}

int flood(long bytes) {
  const std::string block(4096, 'x');
  for (long left = bytes; left > 0; left -= 4096) write_all(block);
  return 0;
}

int obey(const std::string& line) {
  std::istringstream rest(line);
  std::string name;
  rest >> name;
  const auto number = [&rest] {
    long n = 0;
    rest >> n;
    return n;
  };
  const std::map<std::string, std::function<int()>> commands{
      {"print", [&] { return write_all(line.substr(std::min<std::size_t>(line.size(), 6))), 0; }},
      {"echo-stdin", [] { return write_all(read_all(STDIN_FILENO)), 0; }},
      {"exit", [&] { return static_cast<int>(number()); }},
      {"spin", []() -> int { spin(); }},
      {"sleep-ignoring-term", &sleep_ignoring_term},
      {"flood", [&] { return flood(number()); }},
      {"flood-by-two", &flood_by_two},
      {"abort", []() -> int { std::abort(); }},
      {"signal", [&] { return ::raise(static_cast<int>(number())); }},
      {"getpid",
       [] { return write_all(std::to_string(::getpid()) + " " + std::to_string(::getuid())), 0; }},
      {"fds", [] { return write_all(open_descriptors()), 0; }},
      {"open-many", &open_many},
      {"write", [&] { return write_file(rest); }},
      {"touch-and-remove", &touch_and_remove},
      {"orphans", [&] { return orphans(number()); }},
      {"grow", [&] { return hold(number(), MAP_PRIVATE) ? 0 : 1; }},
      {"grow-in-children",
       [&] {
         const long children = number();
         return grow_in_children(children, number());
       }},
      {"survive-children",
       [&] {
         const long children = number();
         return survive_children(children, number());
       }},
      {"litter", &litter},
      {"shared-memory", [&] { return hold(number(), MAP_SHARED) ? (sleep_on(), 0) : 1; }},
      {"syscall-mount",
       [] { return ::mount("tmpfs", "/tmp", "tmpfs", 0, nullptr) != 0 && errno == EPERM ? 0 : 1; }},
      {"close-output",
       [] {
         write_all("last words");
         ::close(STDOUT_FILENO);
         ::close(STDERR_FILENO);
         ::usleep(50'000);
         return 0;
       }},
  };
  const auto found = commands.find(name);
  return found == commands.end() ? kUnknownCommand : found->second();
}

int converse() {
  for (;;) {
    thor::Message message;
    std::vector<thor::UniqueFd> fds;
    switch (thor::receive_message(thor::kDialogueFd, &message, &fds)) {
      case thor::Received::kNothing: continue;
      case thor::Received::kClosed: return 0;
      case thor::Received::kMessage: break;
    }
    const std::string line = read_all(fds.at(0).get());
    if (line == "hang-up") ::close(thor::kDialogueFd);
    if (line == "hang-up") spin();
    if (line == "leave") return 7;
    std::string reply;
    if (line.starts_with("chatter ")) {  // replies that nobody asked for
      for (int n = std::stoi(line.substr(8)); n > 0; --n) ::send(thor::kDialogueFd, "more", 4, 0);
      reply = "chattered";
    } else {
      reply = line.starts_with("say ") ? line.substr(4) : std::to_string(obey(line));
    }
    ::send(thor::kDialogueFd, reply.data(), reply.size(), MSG_NOSIGNAL);
  }
}

int run(void* /*context*/, const thor::GuestJob& job) {
  if (job.has_dialogue) return converse();
  if (job.payload == "oom") {
    *job.out_of_memory = true;
    return 1;
  }
  return obey(job.payload);
}

std::array<int, 2> pipe_that_waits() {
  std::array<int, 2> ends{};
  if (::pipe(ends.data()) != 0) ::_exit(1);
  return ends;
}

void say_parked(int standard_output) {
  const std::array<int, 3> fds{standard_output, standard_output, standard_output};
  thor::send_message(thor::kControlFd, {.kind = thor::MessageKind::kParked}, fds);
}

void refresh(void* /*context*/, std::uint64_t /*seed*/) {
  const char* wanted = std::getenv("STUB_REFRESH");
  const std::string what = wanted == nullptr ? "" : wanted;
  thor::Message message{.kind = thor::MessageKind::kExited};
  if (what == "die") ::_exit(1);
  if (what == "end-early") thor::send_message(thor::kControlFd, message);
  if (what == "park-twice") say_parked(pipe_that_waits()[0]);
  if (what == "babble") ::send(thor::kControlFd, "hello", 5, 0);
  if (what == "unlikely-flags") {
    std::memset(static_cast<void*>(&message), 7, sizeof(message));
    message.kind = thor::MessageKind::kParked;
    thor::send_message(thor::kControlFd, message);
  }
  if (what == "pipes-that-wait") {
    const std::array<int, 2> ends = pipe_that_waits();
    static_cast<void>(::write(ends[1], "one byte", 8));
    say_parked(ends[0]);
    sleep_on();
  }
}

// From here on system calls fail: "NUMBER ERRNO [ARGUMENT MASK VALUE]...", more after a semicolon.
// A call fails if the low half of each argument, masked, has its value.
void deny(const std::string& rules) {
  std::vector<sock_filter> program;
  const auto add = [&](unsigned code, unsigned value, unsigned otherwise = 0) {
    program.push_back(
        {static_cast<unsigned short>(code), 0, static_cast<unsigned char>(otherwise), value});
  };
  std::istringstream all(rules);
  for (std::string rule; std::getline(all, rule, ';');) {
    std::istringstream text(rule);
    unsigned number = 0;
    unsigned error = 0;
    text >> number >> error;
    std::vector<std::array<unsigned, 3>> arguments;
    for (std::array<unsigned, 3> one{}; text >> one[0] >> one[1] >> one[2];) {
      arguments.push_back(one);
    }
    const auto rest = static_cast<unsigned>(arguments.size()) * 3 + 1;
    add(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr));
    add(BPF_JMP | BPF_JEQ | BPF_K, number, rest);
    for (unsigned i = 0; i < arguments.size(); ++i) {
      const auto [argument, mask, value] = arguments[i];
      add(BPF_LD | BPF_W | BPF_ABS, unsigned{offsetof(seccomp_data, args)} + argument * 8);
      add(BPF_ALU | BPF_AND | BPF_K, mask);
      add(BPF_JMP | BPF_JEQ | BPF_K, value, rest - (i + 1) * 3);
    }
    add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error);
  }
  add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  const sock_fprog filter{static_cast<unsigned short>(program.size()), program.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
    std::cerr << "denying " << rules << " failed\n";
    ::_exit(1);
  }
}

bool named(const char* variable, const char* tier) {
  const char* value = std::getenv(variable);
  return value != nullptr && tier != nullptr && std::string(value).find(tier) != std::string::npos;
}

thor::JailSpec jail_spec() {
  thor::JailSpec spec;
  for (const char* path : {"/usr", "/lib", "/lib64"}) {
    if (std::filesystem::exists(path)) spec.readonly_paths.emplace_back(path);
  }
  if (const char* more = std::getenv("STUB_READONLY")) {
    if (more == std::string("none")) {
      spec.readonly_paths.clear();
    } else {
      spec.readonly_paths.emplace_back(more);
    }
  }
  if (std::getenv("STUB_LAYERS") != nullptr) spec.required_layers = 0;
  if (const char* group = std::getenv("STUB_CGROUP")) {
    spec.memory_cgroup = true;
    spec.cgroup_path = group;
  }
  return spec;
}

}  // namespace

int main(int argc, char** argv) {
  const char* tier = argc > 1 ? argv[1] : nullptr;
  if (named("STUB_REFUSE", tier)) {
    std::cerr << "stub refuses to start\n";
    return 1;
  }
  if (named("STUB_HANG", tier)) sleep_on();
  std::thread idle;
  if (std::getenv("STUB_THREAD") != nullptr) idle = std::thread(&sleep_on);
  if (const char* rules = std::getenv("STUB_DENY")) deny(rules);
  const auto nothing = [](void* /*context*/) {};
  thor::serve_template(thor::kControlFd, jail_spec(),
                       {.context = nullptr,
                        .before_fork = nothing,
                        .after_fork_parent = nothing,
                        .after_fork_child = nothing,
                        .refresh = &refresh,
                        .run = &run});
}
