#include "core/slot.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <string>
#include <utility>

#include "util/unique_fd.h"

namespace thor {
namespace {

using std::chrono::milliseconds;

constexpr int kExitStatusShift = 8;

constexpr Clock::time_point kStart{std::chrono::seconds(100)};

Slot slot_with(std::string_view output, KillReason killed = KillReason::kNone) {
  Job job;
  job.request.limits.max_output_bytes = 10;
  job.request.limits.cpu = std::chrono::seconds(2);
  job.request.limits.timeout = milliseconds(100);
  Slot slot(std::move(job));
  slot.output.stdout_text.append(output);
  slot.killed = killed;
  slot.started = kStart;
  return slot;
}

Message exited_with(int code) {
  return {
      .kind = MessageKind::kExited, .started = true, .snippet_status = code << kExitStatusShift};
}

Message killed_by(int signal) {
  return {.kind = MessageKind::kExited, .started = true, .snippet_status = signal};
}

Result conclude_now(const Slot& slot, const Message& exited, bool killed_for_memory = false) {
  return conclude(slot, {exited, killed_for_memory}, kStart + milliseconds(5));
}

TEST(Slot, IsLateAfterAQuarterOfItsTimeButNeverBeforeItAges) {
  Slot slot = slot_with("");
  EXPECT_EQ(slot.ages(milliseconds(20)), kStart + milliseconds(20));
  EXPECT_EQ(slot.is_late(milliseconds(20)), kStart + milliseconds(25));
  EXPECT_EQ(slot.is_late(milliseconds(70)), kStart + milliseconds(70));
  slot.output.wall = milliseconds(40);  // of a dialogue's earlier steps
  EXPECT_EQ(slot.is_late(milliseconds(10)), kStart + milliseconds(15));
}

TEST(Conclude, SilentSuccessIsOk) {
  const Result result = conclude_now(slot_with(""), exited_with(0));
  EXPECT_EQ(result.status, Status::kOk);
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.wall, milliseconds(5));
}

TEST(Conclude, NonZeroExitIsAnError) {
  const Result result = conclude_now(slot_with("x"), exited_with(3));
  EXPECT_EQ(result.status, Status::kError);
  EXPECT_EQ(result.exit_code, 3);
  EXPECT_EQ(result.signal, 0);
}

TEST(Conclude, TooMuchOutputIsNotOkEvenWithExitCodeZero) {
  const Result result = conclude_now(slot_with("0123456789abc"), exited_with(0));
  EXPECT_EQ(result.status, Status::kOutput);
  EXPECT_TRUE(result.truncated);
}

TEST(Conclude, AnErrorStaysAnErrorWhenItAlsoPrintedTooMuch) {
  EXPECT_EQ(conclude_now(slot_with("0123456789abc"), exited_with(1)).status, Status::kError);
}

TEST(Conclude, TheGuestsHintTurnsOnlyAnErrorIntoMemory) {
  Message failed = exited_with(1);
  failed.out_of_memory = true;
  EXPECT_EQ(conclude_now(slot_with(""), failed).status, Status::kMemory);
  Message fine = exited_with(0);
  fine.out_of_memory = true;
  EXPECT_EQ(conclude_now(slot_with(""), fine).status, Status::kOk);
}

TEST(Conclude, Signals) {
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGSEGV)).status, Status::kError);
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGSEGV)).signal, SIGSEGV);
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGSYS)).status, Status::kKilled);
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGXCPU)).status, Status::kTimeout);
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGKILL)).status, Status::kError);
  Message spent = killed_by(SIGKILL);  // ignored SIGXCPU until the hard limit
  spent.usage.cpu_ns = 2'100'000'000;
  EXPECT_EQ(conclude_now(slot_with(""), spent).status, Status::kTimeout);
}

TEST(Conclude, OurKillsSayWhyAndKeepTheOutput) {
  const Result late = conclude_now(slot_with("part", KillReason::kTimeout), killed_by(SIGKILL));
  EXPECT_EQ(late.status, Status::kTimeout);
  EXPECT_EQ(late.stdout_data, "part");
  EXPECT_EQ(late.exit_code, -1);
  const Result flood = conclude_now(slot_with("part", KillReason::kOutput), killed_by(SIGKILL));
  EXPECT_EQ(flood.status, Status::kOutput);
}

TEST(Conclude, MemoryKills) {
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGKILL), true).status, Status::kMemory);
  EXPECT_EQ(conclude_now(slot_with(""), exited_with(1), true).status, Status::kMemory);
  EXPECT_EQ(conclude_now(slot_with(""), exited_with(0), true).status, Status::kOk) << "survived it";
  EXPECT_EQ(conclude_now(slot_with(""), killed_by(SIGSEGV), true).status, Status::kError);
  EXPECT_EQ(conclude_now(slot_with("", KillReason::kTimeout), killed_by(SIGKILL), true).status,
            Status::kMemory);
}

TEST(Conclude, UsageIsTheTrees) {
  Message message = exited_with(0);
  message.usage = {.cpu_ns = 1'500, .peak_bytes = 4'096};
  const Result result = conclude_now(slot_with(""), message);
  EXPECT_EQ(result.cpu, std::chrono::nanoseconds(1'500));
  EXPECT_EQ(result.peak_memory_bytes, 4'096U);
}

TEST(Conclude, WhatWeFailToDoIsInfra) {
  Message broken = exited_with(1);
  broken.error = {SetupStep::kRlimits, EPERM, 1};
  EXPECT_EQ(conclude_now(slot_with(""), broken).error,
            "setting a resource limit [1]: Operation not permitted (errno 1)");
  Message early = killed_by(SIGKILL);
  early.started = false;
  for (const KillReason killed : {KillReason::kNone, KillReason::kTimeout}) {
    EXPECT_EQ(conclude_now(slot_with("", killed), early).error,
              "the snippet's process was killed before it started");
  }
  for (const Message& message : {killed_by(SIGKILL), exited_with(0), broken, early}) {
    const Result result = conclude_now(slot_with("x", KillReason::kCancelled), message);
    EXPECT_EQ(result.status, Status::kInfra);
    EXPECT_EQ(result.error, "cancelled by the caller");
  }
}

// --- time, which the tests own ---

TEST(Slot, MayRunUntilItsTimeoutWhateverOthersOfTheDialogueTook) {
  Slot slot = slot_with("");
  EXPECT_EQ(slot.deadline(), kStart + milliseconds(100));
  slot.output.wall = milliseconds(30);
  EXPECT_EQ(slot.deadline(), kStart + milliseconds(70));
  slot.output.wall = milliseconds(130);
  EXPECT_EQ(slot.deadline(), kStart - milliseconds(30)) << "over before it begins";
}

TEST(ConcludeStep, AStepsOutputAndTimeAreItsOwn) {
  Slot slot = slot_with("abc");
  const Result result = conclude_step(&slot, "reply", false, kStart + milliseconds(7));
  EXPECT_EQ(result.status, Status::kOk);
  EXPECT_EQ(result.reply, "reply");
  EXPECT_EQ(result.stdout_data, "abc");
  EXPECT_EQ(result.wall, milliseconds(7));
  EXPECT_EQ(result.exit_code, -1);
}

TEST(ConcludeStep, TooMuchOutputIsSaid) {
  Slot slot = slot_with("0123456789abc");
  const Result result = conclude_step(&slot, "reply", false, kStart);
  EXPECT_EQ(result.status, Status::kOutput);
  EXPECT_EQ(result.reply, "reply");
}

TEST(ConcludeStep, WhatAccumulatesIsOfTheLastOne) {
  Slot first = slot_with("abc");
  const Result step = conclude_step(&first, "reply", true, kStart + milliseconds(7));
  EXPECT_EQ(step.stdout_data, "");
  EXPECT_EQ(step.wall, milliseconds(7));
  Slot last = slot_with("");
  last.output = std::move(first.output);
  last.output.stdout_text.append("def");
  const Result whole = conclude_now(last, exited_with(0));
  EXPECT_EQ(whole.stdout_data, "abcdef");
  EXPECT_EQ(whole.wall, milliseconds(12));
}

struct Pipe {
  Pipe() {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK), 0);
    read_end.reset(ends[0]);
    write_end.reset(ends[1]);
  }
  // Returns what fitted.
  [[nodiscard]] ssize_t write(const std::string& text) const {
    return ::write(write_end.get(), text.data(), text.size());
  }
  UniqueFd read_end;
  UniqueFd write_end;
};

TEST(Slot, DrainsBothStreamsAndKnowsClosedOnes) {
  Slot slot = slot_with("");
  const Pipe out;
  Pipe err;
  EXPECT_TRUE(slot.drain(out.read_end.get(), err.read_end.get())) << "nothing is there";
  ASSERT_EQ(out.write("abc"), 3);
  ASSERT_EQ(err.write("de"), 2);
  err.write_end.reset();
  EXPECT_TRUE(slot.drain(out.read_end.get(), err.read_end.get()));
  EXPECT_TRUE(slot.drain(-1, err.read_end.get()));
  EXPECT_EQ(slot.output.stdout_text.text(), "abc");
  EXPECT_EQ(slot.output.stderr_text.text(), "de");
}

TEST(Slot, AFloodIsNotReadToItsEnd) {
  Slot slot = slot_with("");
  const Pipe out;
  ASSERT_EQ(out.write(std::string(kFloodFactor * 10, 'x')), kFloodFactor * 10);
  EXPECT_TRUE(slot.drain(out.read_end.get(), -1)) << "the most there may be";
  ASSERT_EQ(out.write("x"), 1);
  EXPECT_FALSE(slot.drain(out.read_end.get(), -1));
  ASSERT_EQ(out.write("x"), 1);
  EXPECT_FALSE(slot.drain(out.read_end.get(), -1));
  EXPECT_EQ(slot.output.stdout_text.total(), kFloodFactor * 10 + 1) << "nor read any further";
}

}  // namespace
}  // namespace thor
