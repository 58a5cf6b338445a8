#include "thor/probe.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <future>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "core/capabilities.h"
#include "core/id_maps.h"
#include "core/seccomp_filter.h"
#include "util/kernel_text.h"

namespace thor {
namespace {

namespace fs = std::filesystem;

constexpr const char* kNoUserNamespaces = "this host grants no user namespaces";

using Layers = std::map<std::string, ProbedLayer>;

Layers by_name(const std::vector<ProbedLayer>& layers) {
  Layers named;
  for (const ProbedLayer& layer : layers) named[layer.name] = layer;
  return named;
}

// What a forked child finds once `restrict` has taken something from it. Empty if that failed.
Layers probed_after(const std::function<bool()>& restrict) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return {};
  const pid_t child = ::fork();
  if (child == 0) {
    std::string text;
    if (restrict()) {
      for (const ProbedLayer& layer : probe_host()) {
        text += layer.name + "\t" + (layer.granted ? "1" : "0") + "\t" + layer.detail + "\n";
      }
    }
    ::_exit(::write(ends[1], text.data(), text.size()) < 0 ? 1 : 0);
  }
  ::close(ends[1]);
  std::string text;
  std::array<char, 4096> chunk{};
  for (ssize_t n = 0; (n = ::read(ends[0], chunk.data(), chunk.size())) > 0;) {
    text.append(chunk.data(), static_cast<std::size_t>(n));
  }
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  Layers layers;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::vector<std::string_view> fields = split(std::string_view(line), '\t');
    const std::string name(fields.at(0));
    layers[name] = {name, fields.at(1) == "1", std::string(fields.at(2))};
  }
  return layers;
}

bool answer(long syscall_number, std::uint32_t action) {
  return !set_no_new_privileges() &&
         !install_seccomp_filter(
             {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
              BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(syscall_number), 0, 1),
              BPF_STMT(BPF_RET | BPF_K, action), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)});
}

bool forbid_user_namespaces() {
  const IdMap ordinary{1000, ::geteuid(), ::getegid()};
  return ::unshare(CLONE_NEWUSER) == 0 && !write_id_maps("/proc/self", {ordinary}) &&
         write_text("/proc/sys/user/max_user_namespaces", "0");
}

class Probe : public ::testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "ThreadSanitizer's own thread is one too many";
#endif
  }
};

TEST_F(Probe, EveryLayerIsThereAndARefusalSaysWhy) {
  const std::vector<ProbedLayer> layers = probe_host();
  EXPECT_EQ(by_name(layers).size(), layers.size());
  EXPECT_EQ(layers.size(), 20U);
  for (const ProbedLayer& layer : layers)
    EXPECT_TRUE(layer.granted || !layer.detail.empty()) << layer.name;
  EXPECT_TRUE(by_name(layers)["no_new_privs"].granted);
  EXPECT_GT(std::stoi(by_name(layers)["cpus"].detail), 0);
}

TEST_F(Probe, LeavesTheProcessAsItWas) {
  const auto state = [] {
    std::string text;
    for (const fs::directory_entry& entry : fs::directory_iterator("/proc/self/ns")) {
      text += fs::read_symlink(entry.path()).string() + "\n";
    }
    const fs::directory_iterator open_files("/proc/self/fd");
    text += std::to_string(std::distance(begin(open_files), end(open_files)));
    return text + read_text("/proc/self/mountinfo").value_or("");
  };
  const std::string before = state();
  probe_host();
  EXPECT_EQ(state(), before);
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);
  EXPECT_EQ(errno, ECHILD);
}

TEST_F(Probe, ASysctlThatForbidsUserNamespacesIsSeen) {
  Layers layers = probed_after(forbid_user_namespaces);
  if (layers.empty()) GTEST_SKIP() << kNoUserNamespaces;
  for (const char* name : {"user_namespace", "network_namespace", "private_root", "private_proc"}) {
    EXPECT_FALSE(layers[name].granted) << name;
    EXPECT_EQ(layers[name].detail, "unshare(CLONE_NEWUSER): No space left on device (errno 28)");
  }
  EXPECT_TRUE(layers["seccomp_filter"].granted) << layers["seccomp_filter"].detail;
}

TEST_F(Probe, ASeccompFilterLikeAContainersIsSeen) {
  Layers layers = probed_after([] { return answer(SYS_unshare, SECCOMP_RET_ERRNO | EPERM); });
  EXPECT_EQ(layers["user_namespace"].detail,
            "unshare(CLONE_NEWUSER): Operation not permitted (errno 1)");
  EXPECT_FALSE(layers["mount_namespace"].granted);
  EXPECT_TRUE(layers["clone3"].granted) << layers["clone3"].detail;
}

TEST_F(Probe, OnlyTheLayerThatIsMissingIsReported) {
  Layers layers = probed_after([] { return answer(SYS_mount, SECCOMP_RET_ERRNO | EPERM); });
  if (!layers["user_namespace"].granted) GTEST_SKIP() << kNoUserNamespaces;
  EXPECT_TRUE(layers["mount_namespace"].granted);
  EXPECT_EQ(layers["private_root"].detail,
            "making mounts private: Operation not permitted (errno 1)");
  layers = probed_after([] { return answer(SYS_pivot_root, SECCOMP_RET_KILL_PROCESS); });
  EXPECT_TRUE(layers["private_proc"].granted) << layers["private_proc"].detail;
  EXPECT_EQ(layers["private_root"].detail,
            "the process that tried it was killed by Bad system call");
}

TEST(ProbeThreads, ASecondThreadIsRefused) {
  std::promise<void> done;
  std::thread other([&done] { done.get_future().wait(); });
  EXPECT_THROW(probe_host(), std::runtime_error);
  done.set_value();
  other.join();
}

}  // namespace
}  // namespace thor
