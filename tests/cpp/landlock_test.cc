#include "core/landlock.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <functional>
#include <thread>

#include "core/capabilities.h"
#include "util/unique_fd.h"

namespace thor {
namespace {

namespace fs = std::filesystem;

// Collects, in the child, which of its checks failed and with which errno.
class Checks {
 public:
  void works(bool ok, const char* what) {
    if (!ok) text_ += std::string(what) + ": " + std::strerror(errno) + "\n";
  }
  void refused(bool ok, int expected, const char* what) {
    if (ok || errno != expected) {
      text_ += std::string(what) + ": got " + (ok ? "success" : std::strerror(errno)) + "\n";
    }
  }
  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  std::string text_;
};

int exit_code(pid_t child) {
  int status = -1;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

class Landlock : public ::testing::Test {
 protected:
  void SetUp() override {
    if (landlock_abi() < 2) GTEST_SKIP() << "Landlock ABI " << landlock_abi() << ", expected >= 2";
    std::string name = (fs::temp_directory_path() / "thor-landlock-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
    fs::create_directories(root_ / "work" / "inner");
    fs::create_directories(root_ / "other");
  }
  void TearDown() override { fs::remove_all(root_); }

  // What failed in a forked child behind the wall; "" if nothing did.
  std::string behind_the_wall(const std::function<void(Checks&)>& body) {
    int report[2];
    if (::pipe2(report, O_CLOEXEC) != 0) return "pipe2";
    const pid_t child = ::fork();
    if (child == 0) {
      Checks checks;
      SetupError error = set_no_new_privileges();
      if (!error) error = restrict_files({work(), "/dev/shm"});
      checks.works(!error, describe(error).c_str());
      if (!error) body(checks);
      ::_exit(::write(report[1], checks.text().data(), checks.text().size()) < 0 ? 1 : 0);
    }
    ::close(report[1]);
    std::string text;
    std::array<char, 4096> chunk{};
    for (ssize_t n = 0; (n = ::read(report[0], chunk.data(), chunk.size())) > 0;) {
      text.append(chunk.data(), static_cast<std::size_t>(n));
    }
    ::close(report[0]);
    return exit_code(child) == 0 ? text : text + "the child died";
  }

  [[nodiscard]] std::string work() const { return root_ / "work"; }
  [[nodiscard]] std::string work(const char* name) const { return root_ / "work" / name; }
  [[nodiscard]] std::string other(const char* name) const { return root_ / "other" / name; }

  fs::path root_;
};

bool make_file(const std::string& path) {
  return static_cast<bool>(UniqueFd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, S_IRWXU)));
}

bool can_open(const std::string& path, int flags) {
  return static_cast<bool>(UniqueFd(::open(path.c_str(), flags | O_CLOEXEC)));
}

TEST_F(Landlock, OutsideNothingCanBeChanged) {
  ASSERT_TRUE(make_file(other("file")));
  EXPECT_EQ(behind_the_wall([this](Checks& c) {
              c.refused(make_file(other("new")), EACCES, "create");
              c.refused(can_open(other("file"), O_WRONLY), EACCES, "open for writing");
              c.refused(::mkdir(other("dir").c_str(), S_IRWXU) == 0, EACCES, "mkdir");
              c.refused(::symlink("x", other("link").c_str()) == 0, EACCES, "symlink");
              c.refused(::unlink(other("file").c_str()) == 0, EACCES, "unlink");
              c.refused(::rmdir((root_ / "other").c_str()) == 0, EACCES, "rmdir");
              c.refused(::rename(other("file").c_str(), work("file").c_str()) == 0, EACCES,
                        "rename into the writable directory");
              c.works(make_file(work("mine")), "create below the writable directory");
              c.refused(::link(work("mine").c_str(), other("mine").c_str()) == 0, EACCES,
                        "link out of the writable directory");
              c.refused(::mount("none", work().c_str(), "tmpfs", 0, nullptr) == 0, EPERM, "mount");
              if (landlock_abi() >= 3) {
                c.refused(::truncate(other("file").c_str(), 0) == 0, EACCES, "truncate");
              }
            }),
            "");
}

TEST_F(Landlock, OutsideEverythingCanBeRead) {
  ASSERT_TRUE(make_file(other("file")));
  EXPECT_EQ(behind_the_wall([this](Checks& c) {
              c.works(can_open(other("file"), O_RDONLY), "open for reading");
              c.works(can_open(other(""), O_RDONLY | O_DIRECTORY), "open a directory");
              c.works(can_open("/proc/self/status", O_RDONLY), "/proc/self/status");
            }),
            "");
}

TEST_F(Landlock, InsideFilesLiveAsAnywhere) {
  EXPECT_EQ(behind_the_wall([this](Checks& c) {
              c.works(make_file(work("a")), "create");
              c.works(can_open(work("a"), O_RDWR | O_TRUNC), "open for writing");
              c.works(::truncate(work("a").c_str(), 100) == 0, "truncate");
              c.works(::mkdir(work("dir").c_str(), S_IRWXU) == 0, "mkdir");
              c.works(::symlink("a", work("link").c_str()) == 0, "symlink");
              c.works(::mkfifo(work("fifo").c_str(), S_IRWXU) == 0, "mkfifo");
              c.works(::link(work("a").c_str(), work("dir/hard").c_str()) == 0,
                      "link into another directory");
              c.works(::rename(work("a").c_str(), work("b").c_str()) == 0, "rename");
              c.works(::rename(work("b").c_str(), work("inner/b").c_str()) == 0,
                      "rename into another directory");
              c.works(::rename(work("inner").c_str(), work("dir/inner").c_str()) == 0,
                      "move a directory");
              c.works(::unlink(work("dir/inner/b").c_str()) == 0, "unlink");
              c.works(::rmdir(work("dir/inner").c_str()) == 0, "rmdir");
            }),
            "");
}

TEST_F(Landlock, DevicesAndPipesCanBeWritten) {
  EXPECT_EQ(behind_the_wall([](Checks& c) {
              for (const char* device : {"/dev/null", "/dev/zero", "/dev/full", "/dev/urandom"}) {
                c.works(can_open(device, O_RDWR | O_CREAT | O_TRUNC), device);
              }
              int ends[2];
              c.works(::pipe(ends) == 0, "pipe");
              c.works(can_open("/proc/self/fd/" + std::to_string(ends[1]), O_WRONLY),
                      "a pipe by its name in /proc");
              const int memory = ::memfd_create("x", MFD_CLOEXEC);
              c.works(can_open("/proc/self/fd/" + std::to_string(memory), O_RDWR),
                      "a memfd by its name in /proc");
            }),
            "");
}

TEST_F(Landlock, ProcessesAndThreadsInheritItAndRun) {
  EXPECT_EQ(behind_the_wall([this](Checks& c) {
              const pid_t child = ::fork();
              if (child == 0) {
                ::execl("/bin/sh", "sh", "-c",
                        "echo x > \"$0/made\" && ! echo x 2>/dev/null > \"$0/../other/x\"",
                        work().c_str(), nullptr);
                ::_exit(127);
              }
              c.works(exit_code(child) == 0, "sh behind the wall");
              c.works(can_open(work("made"), O_RDONLY), "what sh made");
              bool refused = false;
              std::thread([&] { refused = !make_file(other("thread")) && errno == EACCES; }).join();
              c.works(refused, "a thread is behind the wall");
              const pid_t sleeper = ::fork();
              if (sleeper == 0) {
                for (;;) ::pause();
              }
              c.works(::kill(sleeper, SIGKILL) == 0, "signal to a child");
              ::waitpid(sleeper, nullptr, 0);
            }),
            "");
}

// What Python's multiprocessing stands on.
TEST_F(Landlock, SemaphoresSharedMemoryAndSocketsWork) {
  EXPECT_EQ(behind_the_wall([this](Checks& c) {
              const std::string name = "/thor-landlock-" + std::to_string(::getpid());
              sem_t* semaphore = ::sem_open(name.c_str(), O_CREAT | O_EXCL, S_IRWXU, 1);
              c.works(semaphore != SEM_FAILED && ::sem_wait(semaphore) == 0, "sem_open");
              c.works(::sem_unlink(name.c_str()) == 0, "sem_unlink");
              const UniqueFd shared(::shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, S_IRWXU));
              c.works(shared && ::ftruncate(shared.get(), 4096) == 0, "shm_open");
              c.works(::shm_unlink(name.c_str()) == 0, "shm_unlink");
              int pair[2];
              c.works(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
              sockaddr_un address{AF_UNIX, {}};
              work("socket").copy(address.sun_path, sizeof(address.sun_path) - 1);
              const auto* where = reinterpret_cast<const sockaddr*>(&address);
              const UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM, 0));
              c.works(::bind(listener.get(), where, sizeof(address)) == 0, "bind a named socket");
              c.works(::listen(listener.get(), 1) == 0, "listen");
              const UniqueFd caller(::socket(AF_UNIX, SOCK_STREAM, 0));
              c.works(::connect(caller.get(), where, sizeof(address)) == 0, "connect to it");
            }),
            "");
}

TEST_F(Landlock, NoTcp) {
  if (landlock_abi() < 4) GTEST_SKIP() << "Landlock ABI " << landlock_abi() << ", expected >= 4";
  EXPECT_EQ(behind_the_wall([](Checks& c) {
              sockaddr_in address{};
              address.sin_family = AF_INET;
              address.sin_addr.s_addr = ::htonl(INADDR_LOOPBACK);
              const auto* where = reinterpret_cast<const sockaddr*>(&address);
              const UniqueFd socket(::socket(AF_INET, SOCK_STREAM, 0));
              c.refused(::bind(socket.get(), where, sizeof(address)) == 0, EACCES, "bind");
              address.sin_port = ::htons(9);
              c.refused(::connect(socket.get(), where, sizeof(address)) == 0, EACCES, "connect");
            }),
            "");
}

TEST_F(Landlock, NeitherSignalsNorAbstractSocketsReachOutside) {
  if (landlock_abi() < 6) GTEST_SKIP() << "Landlock ABI " << landlock_abi() << ", expected >= 6";
  sockaddr_un address{AF_UNIX, {}};
  const std::string name = "thor-landlock-" + std::to_string(::getpid());
  name.copy(address.sun_path + 1, sizeof(address.sun_path) - 1);
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const auto* where = reinterpret_cast<const sockaddr*>(&address);
  const UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(::bind(listener.get(), where, length), 0);
  ASSERT_EQ(::listen(listener.get(), 1), 0);
  EXPECT_EQ(behind_the_wall([&](Checks& c) {
              const UniqueFd caller(::socket(AF_UNIX, SOCK_STREAM, 0));
              c.refused(::connect(caller.get(), where, length) == 0, EPERM, "abstract socket");
              c.refused(::kill(::getppid(), 0) == 0, EPERM, "signal to the parent");
            }),
            "");
}

TEST_F(Landlock, WhatFailsIsNamed) {
  const pid_t child = ::fork();
  if (child == 0) {
    const SetupError error = restrict_files({work(), work("missing")});
    const bool named =
        error.step == SetupStep::kLandlock && error.error_number == ENOENT && error.index == 101;
    ::_exit(named ? 0 : 1);
  }
  EXPECT_EQ(exit_code(child), 0);
}

TEST_F(Landlock, AnUnprivilegedCallerNeedsNoNewPrivileges) {
  const pid_t child = ::fork();
  if (child == 0) {
    if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) ::_exit(2);
    const SetupError error = restrict_files({});
    ::_exit(error.error_number == EPERM && error.index == 3 ? 0 : 1);
  }
  EXPECT_EQ(exit_code(child), 0);
}

}  // namespace
}  // namespace thor
