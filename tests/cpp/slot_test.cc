#include "core/slot.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <cerrno>

namespace thor {
namespace {

constexpr int kExitStatusShift = 8;

Slot slot_with(std::string_view output, KillReason killed = KillReason::kNone) {
  Job job;
  job.request.limits.max_output_bytes = 10;
  job.request.limits.cpu = std::chrono::seconds(2);
  Slot slot(std::move(job));
  slot.stdout_text.append(output);
  slot.killed = killed;
  return slot;
}

Message exited_with(int code) {
  return {.kind = MessageKind::kExited, .snippet_status = code << kExitStatusShift};
}

Message killed_by(int signal) { return {.kind = MessageKind::kExited, .snippet_status = signal}; }

Result conclude_now(const Slot& slot, const Message& exited) {
  return conclude(slot, exited, slot.started + std::chrono::milliseconds(5));
}

TEST(Conclude, SilentSuccessIsOk) {
  const Result result = conclude_now(slot_with(""), exited_with(0));
  EXPECT_EQ(result.status, Status::kOk);
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.wall, std::chrono::milliseconds(5));
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

TEST(Conclude, WhatWeFailToDoIsInfra) {
  Message broken = exited_with(1);
  broken.error = {SetupStep::kWorkTmpfs, ENOMEM, 1};
  const Result result = conclude_now(slot_with(""), broken);
  EXPECT_EQ(result.status, Status::kInfra);
  EXPECT_NE(result.error.find("private tmpfs [1]"), std::string::npos);
  const Message gone{.kind = MessageKind::kExited, .init_status = SIGKILL};
  EXPECT_EQ(conclude_now(slot_with(""), gone).status, Status::kInfra);
  EXPECT_EQ(conclude_now(slot_with("", KillReason::kCancelled), killed_by(SIGKILL)).status,
            Status::kInfra);
}

}  // namespace
}  // namespace thor
