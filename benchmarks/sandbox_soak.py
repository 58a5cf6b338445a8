"""Runs mixed snippets through one sandbox for long, and shows that nothing grows or is left.

    python benchmarks/sandbox_soak.py --requests 200000

Every answer is checked. Between rounds, with nothing running, it counts what there is; at the end a
straight line through those samples must not rise by more than the table's tolerance, and after
``close`` nothing may be left. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import append_record, print_table
from sandbox_accounting import descendants
from sandbox_footprint import Footprint, Growth, control_groups, fit, footprint

from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status

_RESULTS = Path(__file__).parent / "results" / "sandbox_soak.jsonl"
_MARK = f"soak-{os.getpid()}-"
_SETTLE_S = 120.0
_WARM_UP_ROUNDS = 2  # until allocators and jails have reached what they need


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of request: ``run`` makes it and says what was wrong with the answer, or ``""``."""

    name: str
    weight: int
    run: Callable[[NativeSandbox, int], Awaitable[str]]


def _snippet(
    code: str, status: Status, stdout: str | None = None, **limits: float
) -> Callable[[NativeSandbox, int], Awaitable[str]]:
    """``{i}`` in code and output is the request's number."""

    async def run(sandbox: NativeSandbox, i: int) -> str:
        request = ExecutionRequest(code.replace("{i}", str(i)), **limits)  # type: ignore[arg-type]
        result = await sandbox.submit(request)
        wanted = result.stdout if stdout is None else stdout.replace("{i}", str(i))
        if result.status is status and result.stdout == wanted:
            return ""
        return f"{result}, expected {status} and {wanted!r}"

    return run


async def _stream(sandbox: NativeSandbox, i: int) -> str:
    with sandbox.open() as block:
        block.feed(f"x = {i}\nprint(x)\n")
        block.feed("print(x + 1)\n")
        result = await block.afinish()
    return "" if result.stdout == f"{i}\n{i + 1}\n" else f"stream {i}: {result}"


async def _session(sandbox: NativeSandbox, i: int) -> str:
    with sandbox.session(rewindable=i % 2 == 0) as session:
        await session.submit(f"x = {i}")
        result = await session.submit("print(x)")
        if i % 2 == 0:
            await session.submit("x = None")
            await session.arewind()
            again = await session.submit("print(x)")
            if again.stdout != result.stdout:
                return f"rewound session {i}: {again}"
    return "" if result.stdout == f"{i}\n" else f"session {i}: {result}"


async def _cancelled(sandbox: NativeSandbox, i: int) -> str:
    task = asyncio.ensure_future(sandbox.submit(ExecutionRequest("while True: pass", timeout_s=60)))
    await asyncio.sleep(0.002 * (i % 8))  # before, while and after it is started
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=60)
    return "" if done and task.cancelled() else f"cancelled {i}: {task}"


_FILES = f"""
for place in ('', '/tmp/', '/dev/shm/'):
    with open(place + '{_MARK}{{i}}', 'w') as file:
        file.write('x' * 10000)
"""
_DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print({i})
"""
_THREADS = """
import threading
threads = [threading.Thread(target=sum, args=(range(100),)) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print({i})
"""
_NUMPY = (
    "import numpy as np\nprint(np.arange({i} % 100).sum() - ({i} % 100) * ({i} % 100 - 1) // 2)"
)
_SYMPY = "from sympy import symbols, factor\nx = symbols('x')\nprint(factor(x**2 - 1))"
_OPEN = "import os\nfor _ in range(50): os.open('.', 0); os.pipe()\nprint({i})"

# In thousandths. Those that hold a slot for long are few: they would be most of the run's time.
KINDS = (
    Kind("trivial", 700, _snippet("print({i})", Status.OK, "{i}\n")),
    Kind("error", 60, _snippet("print({i}); 1 / 0", Status.ERROR, "{i}\n")),
    Kind("syntax error", 20, _snippet("print({i}", Status.ERROR, "")),
    Kind("numpy", 50, _snippet(_NUMPY, Status.OK, "0\n")),
    Kind("sympy", 10, _snippet(_SYMPY, Status.OK, "(x - 1)*(x + 1)\n")),
    Kind("files", 40, _snippet(_FILES, Status.OK, "")),
    Kind("daemon", 30, _snippet(_DAEMON, Status.OK, "{i}\n")),
    Kind("threads", 15, _snippet(_THREADS, Status.OK, "{i}\n")),
    Kind("descriptors", 15, _snippet(_OPEN, Status.OK, "{i}\n")),
    Kind("memory", 15, _snippet("bytearray(3 << 30)", Status.MEMORY, "")),
    Kind(
        "flood",
        10,
        _snippet("while True: print('y' * 1000)", Status.OUTPUT, max_output_bytes=10_000),
    ),
    Kind("timeout", 3, _snippet("while True: pass", Status.TIMEOUT, "", timeout_s=0.2)),
    Kind("signal", 7, _snippet("import os; os.kill(os.getpid(), 9)", Status.ERROR, "")),
    Kind("stream", 10, _stream),
    Kind("session", 10, _session),
    Kind("cancelled", 5, _cancelled),
)


@dataclass
class Soak:
    """One sandbox under load. ``wrong``: what was wrong with answers, the first few of them."""

    sandbox: NativeSandbox
    concurrency: int
    random: random.Random
    asked: int = 0
    answered: int = 0
    wrong_count: int = 0

    def __post_init__(self) -> None:
        self.wrong: list[str] = []
        self.kinds: Counter[str] = Counter()

    async def round(self, requests: int) -> None:
        """Ask that many, ``concurrency`` at a time; return when all are answered."""
        end = self.asked + requests

        async def ask() -> None:
            while self.asked < end:
                i = self.asked
                self.asked += 1
                (kind,) = self.random.choices(KINDS, [kind.weight for kind in KINDS])
                self.kinds[kind.name] += 1
                problem = await kind.run(self.sandbox, i)
                self.answered += 1
                if problem:
                    self.wrong_count += 1
                    self.wrong = [*self.wrong, f"{kind.name}: {problem[:1000]}"][:10]

        await asyncio.gather(*(ask() for _ in range(self.concurrency)))
        await self._settle()

    async def _settle(self) -> None:
        """Until nothing runs and as many processes are there as a moment ago."""
        deadline = time.monotonic() + _SETTLE_S
        before: set[int] = set()
        while time.monotonic() < deadline:
            stats = self.sandbox.stats()
            now = {process.pid for process in descendants()}
            if now == before and not stats["queued"] + stats["running"] + stats["dialogues"]:
                return
            before = now
            await asyncio.sleep(0.2)
        raise SystemExit(f"not idle after {_SETTLE_S:g} s: {self.sandbox.stats()}, expected zeros")


async def soak(args: argparse.Namespace, sandbox: NativeSandbox) -> tuple[Soak, list[Growth]]:
    """The whole run: rounds, each followed by a sample; stops early when the time is up."""
    state = Soak(sandbox, args.concurrency, random.Random(args.seed))
    counts: list[int] = []
    samples: list[Footprint] = []
    started = time.monotonic()
    for n in range(args.rounds):
        await state.round(args.requests // args.rounds)
        if n >= _WARM_UP_ROUNDS:
            counts.append(state.answered)
            samples.append(footprint(_MARK))
            print(
                f"{time.monotonic() - started:6.0f} s {state.answered:8d} {samples[-1]}", flush=True
            )
        if time.monotonic() - started > args.seconds and len(samples) >= 3:
            break
    jails = sandbox.stats()["jails"]
    return state, fit(counts, samples, idle_jails=jails)


def leftovers(before: Footprint) -> list[str]:
    """What is still there after ``close`` that was not before the sandbox was made."""
    after = footprint(_MARK)
    problems = [
        f"{name} is {getattr(after, name)} after close, expected {getattr(before, name)}"
        for name in ("descriptors", "threads", "processes", "zombies", "mounts", "files")
        if getattr(after, name) != getattr(before, name)
    ]
    groups = control_groups(os.getpid())
    return problems + [f"control groups are left: {groups}"] * bool(groups)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no round after that")
    parser.add_argument("--rounds", type=int, default=25, help="samples, and two to warm up")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight")
    parser.add_argument("--slots", type=int, default=None, help="default: the CPUs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=_RESULTS, help="JSON lines; appended to")
    args = parser.parse_args(argv)
    if args.rounds < _WARM_UP_ROUNDS + 3 or args.requests < args.rounds:
        parser.error(
            f"got {args.rounds} rounds of {args.requests} requests, expected at least "
            f"{_WARM_UP_ROUNDS + 3} rounds of one each"
        )
    return args


def main() -> int:
    """Run, report, judge."""
    args = parse()
    loop = asyncio.new_event_loop()
    before = footprint(_MARK)
    started = time.monotonic()
    with NativeSandbox(slots=args.slots) as sandbox:
        sandbox.warm_up()
        state, growths = loop.run_until_complete(soak(args, sandbox))
        stats = sandbox.stats()
    seconds = time.monotonic() - started
    del sandbox, state.sandbox
    problems = leftovers(before)
    loop.close()
    problems += [
        f"{g.name} grew by {g.growth:.1f}, expected <= {g.tolerance:g}" for g in growths if g.grows
    ]
    problems += state.wrong
    if state.answered != state.asked:
        problems.append(f"{state.answered} answers to {state.asked} requests")
    metrics = {
        "answered": state.answered,
        "wrong": state.wrong_count,
        "seconds": round(seconds, 1),
        "kinds": dict(state.kinds),
        "stats": stats,
        "growth": {g.name: [g.first, g.last, round(g.growth, 1), g.tolerance] for g in growths},
        "problems": problems,
    }
    params = {
        name: getattr(args, name) for name in ("requests", "rounds", "concurrency", "slots", "seed")
    }
    append_record(args.output, "sandbox_soak", params, metrics)
    print(f"{state.answered} requests in {seconds:.0f} s, {state.wrong_count} wrong; {stats}")
    header = ("", "first", "last", "fitted growth", "tolerance")
    print_table(
        header,
        [
            (g.name, f"{g.first:,}", f"{g.last:,}", f"{g.growth:,.1f}", f"{g.tolerance:,.0f}")
            for g in growths
        ],
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
