"""Equal pure snippets of a group run once; all others run as often as they are asked for."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.rollout import ObservationEncoder, Prompt, RolloutLimits, RolloutScheduler
from thor_fast.rollout.memo import SnippetMemo
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionRequest, ExecutionResult, Status, StopReason

EOS = 1
PURE = ExecutionRequest("print(6 * 7)")
IMPURE = ExecutionRequest("import time\nprint(time.time())")


class Runs:
    """Gives these results in turn, each once ``gate`` is open."""

    def __init__(self, *results: ExecutionResult, is_open: bool = True) -> None:
        self.n = 0
        self._results = results
        self.gate = asyncio.Event()
        if is_open:
            self.gate.set()

    async def __call__(self) -> ExecutionResult:
        self.n += 1
        result = self._results[(self.n - 1) % len(self._results)]
        await self.gate.wait()
        return result


OK = ExecutionResult(Status.OK, "42\n")


async def test_a_pure_snippet_runs_once() -> None:
    memo, runs = SnippetMemo(), Runs(OK)
    assert [await memo.run(PURE, runs) for _ in range(3)] == [(OK, False), (OK, True), (OK, True)]
    assert runs.n == 1


async def test_whoever_comes_while_it_runs_waits_for_it() -> None:
    memo, runs = SnippetMemo(), Runs(OK, is_open=False)
    tasks = [asyncio.create_task(memo.run(PURE, runs)) for _ in range(3)]
    await asyncio.sleep(0)
    runs.gate.set()
    assert await asyncio.gather(*tasks) == [(OK, False), (OK, True), (OK, True)]
    assert runs.n == 1


@pytest.mark.parametrize(
    "other",
    [
        IMPURE,
        replace(PURE, code="print(42)"),
        replace(PURE, timeout_s=1.0),
        replace(PURE, stdin="x"),
    ],
)
async def test_others_run(other: ExecutionRequest) -> None:
    memo, runs = SnippetMemo(), Runs(OK)
    await memo.run(PURE, runs)
    await memo.run(IMPURE, runs)
    assert await memo.run(other, runs) == (OK, False)
    assert runs.n == 3


@pytest.mark.parametrize(
    "result",
    [
        ExecutionResult(Status.TIMEOUT),
        ExecutionResult(Status.INFRA, error="x"),
        ExecutionResult(Status.MEMORY),
        ExecutionResult(Status.KILLED),
        ExecutionResult(Status.ERROR, signal=11),
        ExecutionResult(Status.OK, "<function f at 0x7f00>\n"),
        ExecutionResult(Status.ERROR, stderr="<f at 0x7f00>"),
    ],
)
async def test_what_another_run_might_not_give_is_not_shared(result: ExecutionResult) -> None:
    memo, runs = SnippetMemo(), Runs(result, is_open=False)
    tasks = [asyncio.create_task(memo.run(PURE, runs)) for _ in range(3)]
    await asyncio.sleep(0)
    runs.gate.set()
    assert await asyncio.gather(*tasks) == [(result, False)] * 3
    good = Runs(OK)
    assert [await memo.run(PURE, good) for _ in range(2)] == [(OK, False), (OK, True)]


async def test_an_error_of_the_snippet_is_shared() -> None:
    failed = ExecutionResult(Status.ERROR, stderr="ZeroDivisionError", exit_code=1)
    memo, runs = SnippetMemo(), Runs(failed)
    assert [await memo.run(PURE, runs) for _ in range(2)] == [(failed, False), (failed, True)]


async def test_a_runner_that_is_cancelled_leaves_the_snippet_to_others() -> None:
    memo, runs = SnippetMemo(), Runs(OK, is_open=False)
    first, second = (asyncio.create_task(memo.run(PURE, runs)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    runs.gate.set()
    assert await second == (OK, False)


async def test_one_who_waits_and_is_cancelled_disturbs_nobody() -> None:
    memo, runs = SnippetMemo(), Runs(OK, is_open=False)
    tasks = [asyncio.create_task(memo.run(PURE, runs)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    runs.gate.set()
    assert [await tasks[0], await tasks[2]] == [(OK, False), (OK, True)]


async def test_a_bug_goes_to_whoever_ran_it() -> None:
    async def broken() -> ExecutionResult:
        raise KeyError("a bug")

    memo = SnippetMemo()
    with pytest.raises(KeyError, match="a bug"):
        await memo.run(PURE, broken)
    assert await memo.run(PURE, Runs(OK)) == (OK, False)


@pytest.mark.parametrize(
    ("code", "memo", "hits"),
    [("print(6 * 7)", True, 3), ("print(6 * 7)", False, 0), ("x", True, 0)],
)
async def test_groups_share_and_count(tokenizers, fake_sandbox, code, memo, hits) -> None:
    tokenizer = tokenizers.bytes
    script = Script((*tokenizer.encode(f"```py\n{code}\n```").ids, EOS))
    sandbox = fake_sandbox()
    scheduler = RolloutScheduler(
        ScriptedEngine({(100,): [script], (101,): [script]}),
        sandbox,
        PythonTool(tokenizer),
        encode=ObservationEncoder(tokenizer),
        limits=RolloutLimits(),
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
        group_size=4,
        memo=memo,
    )
    groups = await scheduler.run([Prompt((100,)), Prompt((101,))])
    for group in groups:
        assert {t.stop_reason for t in group.trajectories} == {StopReason.EOS}
        assert {t.tool_calls[0].observation for t in group.trajectories} == {
            "\n```output\n42\n```\n"
        }
        # What two prompts have in common is run for each.
        assert sum(t.metrics.get("memo_hits", 0) for t in group.trajectories) == hits
    assert len(sandbox.requests) == 8 - 2 * hits
