"""Puts a workload on a backend with so many requests in flight, and keeps what came of it."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from sandbox_accounting import CpuClock
from sandbox_peers.registry import Backend, Blocking
from sandbox_workloads import Snippet, Verdict, judge

from thor_fast.errors import SandboxError
from thor_fast.sandbox import Sandbox
from thor_fast.types import ExecutionRequest, ExecutionResult

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One backend under one workload in one round.

    ``latencies_s``: from handing a snippet over to having its result, sorted. ``cpu_s``: of this
    process and all below it; ``caller_cpu_s``: of this process alone, which for ours includes the
    orchestrator. ``example``: the first answer that was wrong, in a line.
    """

    wall_s: float
    latencies_s: tuple[float, ...]
    cpu_s: float
    caller_cpu_s: float
    verdicts: dict[Verdict, int]
    example: str

    @property
    def executions(self) -> int:
        return len(self.latencies_s)

    @property
    def rate(self) -> float:
        """Executions per second."""
        return self.executions / self.wall_s

    def quantile_s(self, q: float) -> float:
        """The latency that a share ``q`` of the requests stays within (nearest rank)."""
        return self.latencies_s[max(1, math.ceil(q * self.executions)) - 1]


@dataclass(slots=True)
class _Answer:
    snippet: Snippet
    result: ExecutionResult
    latency_s: float


def measure(
    backend: Backend, snippets: Sequence[Snippet], concurrency: int, clock: CpuClock
) -> Measurement:
    """Run all snippets, ``concurrency`` at a time; each client takes the next one when done."""
    gc.collect()
    queue = iter(snippets)
    answers: list[_Answer] = []
    cpu, caller = clock.read(), time.process_time()
    if backend.sandbox is not None:
        wall_s = asyncio.run(_await_all(backend.sandbox, queue, concurrency, answers))
    else:
        assert backend.blocking is not None  # one of the two is there
        wall_s = _block_on_all(backend.blocking, queue, concurrency, answers)
    caller, cpu = time.process_time() - caller, clock.read() - cpu
    if len(answers) != len(snippets):
        raise SandboxError(
            f"{backend.name} gave {len(answers)} answers to {len(snippets)} snippets"
        )
    return _measurement(answers, wall_s, cpu, caller)


def _block_on_all(
    backend: Blocking, queue: Iterator[Snippet], concurrency: int, answers: list[_Answer]
) -> float:
    def client() -> None:
        for snippet in queue:  # a list's iterator may be shared by threads
            request = ExecutionRequest(snippet.code, timeout_s=snippet.timeout_s)
            started = time.perf_counter()
            result = backend.execute(request)
            answers.append(_Answer(snippet, result, time.perf_counter() - started))

    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        done = [clients.submit(client) for _ in range(concurrency)]
        try:
            # Not by joining threads: an interrupted join takes its thread for ended.
            wait(done)
        except BaseException:
            for _ in queue:  # what runs ends, nothing else begins
                pass
            raise
    wall_s = time.perf_counter() - started
    for future in done:
        future.result()
    return wall_s


async def _await_all(
    sandbox: Sandbox, queue: Iterator[Snippet], concurrency: int, answers: list[_Answer]
) -> float:
    async def client() -> None:
        for snippet in queue:
            request = ExecutionRequest(snippet.code, timeout_s=snippet.timeout_s)
            started = time.perf_counter()
            result = await sandbox.submit(request)
            answers.append(_Answer(snippet, result, time.perf_counter() - started))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return time.perf_counter() - started


def _measurement(
    answers: Sequence[_Answer], wall_s: float, cpu_s: float, caller_cpu_s: float
) -> Measurement:
    judged = [(judge(answer.snippet, answer.result), answer) for answer in answers]
    wrong = [answer for verdict, answer in judged if verdict is Verdict.WRONG]
    return Measurement(
        wall_s=wall_s,
        latencies_s=tuple(sorted(answer.latency_s for answer in answers)),
        cpu_s=cpu_s,
        caller_cpu_s=caller_cpu_s,
        verdicts=dict(Counter(verdict for verdict, _ in judged)),
        example=_describe(wrong[0]) if wrong else "",
    )


def _describe(answer: _Answer) -> str:
    result, snippet = answer.result, answer.snippet
    said = result.error or result.stderr[-200:] or result.stdout[:200]
    return (
        f"{snippet.code[:60]!r}: got {result.status.value}, {said!r}, "
        f"expected {snippet.ending.value}, {(snippet.last_line or snippet.stdout[:200])!r}"
    )
