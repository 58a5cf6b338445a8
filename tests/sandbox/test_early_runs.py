"""A block that runs while its tokens come gives what running it whole gives."""

from __future__ import annotations

import asyncio
import itertools
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.rollout import RolloutLimits, run_episode
from thor_fast.rollout.early_gain import EarlyGain
from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status
from thor_fast.tools import ExecutionLimits, PythonTool
from thor_fast.types import ExecutionResult, StopReason, Trajectory

from .statement_programs import INVALID, INVALID_AS_TEXT, REVEALING, TYPICAL, VALID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from thor_fast.engines.base import GenerateRequest, TokenChunk

    Until = Callable[[Callable[[], object]], Awaitable[None]]

PROMPT = (1, 2)
EOS = 10**6


def tool(pieces: Sequence[str], limits: ExecutionLimits) -> PythonTool:
    """For a vocabulary of these pieces of text."""
    tokenizer = SimpleNamespace(
        id_to_token=lambda i: pieces[i] if i < len(pieces) else "",
        get_added_tokens_decoder=dict,
        decoder=SimpleNamespace(__getstate__=lambda: '{"type": "Fuse"}'),
    )
    return PythonTool(tokenizer, limits=limits)


async def run(
    sandbox: NativeSandbox,
    pieces: Sequence[str],
    limits: ExecutionLimits,
    engine: ScriptedEngine,
    trajectory: Trajectory | None = None,
    gain: EarlyGain | None = None,
) -> Trajectory:
    return await run_episode(
        engine,
        sandbox,
        tool(pieces, limits),
        PROMPT,
        RolloutLimits(max_response_tokens=10**5),
        encode=lambda text: [0],
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
        session="s",
        trajectory=trajectory,
        gain=gain,
    )


def scripts(pieces: Sequence[str]) -> dict[tuple[int, ...], list[Script]]:
    return {PROMPT: [Script((*range(len(pieces)), EOS))]}


def episode(
    sandbox: NativeSandbox,
    pieces: Sequence[str],
    limits: ExecutionLimits = ExecutionLimits(),  # noqa: B008 - frozen
    *,
    watch: bool = True,
    chunk_tokens: int = 1,
    gain: EarlyGain | None = None,
) -> Trajectory:
    """One whose tokens are these pieces of text."""
    engine = ScriptedEngine(scripts(pieces), watch=watch, chunk_tokens=chunk_tokens)
    return asyncio.run(run(sandbox, pieces, limits, engine, gain=gain))


def written(code: str, indent: str = "") -> str:
    """As a block, which a list may indent as a whole."""
    lines = "".join(f"{indent}{line}\n" for line in code.removesuffix("\n").split("\n"))
    return f"So:\n{indent}```python\n{lines}{indent}```\n"


def essence(result: ExecutionResult | None) -> tuple[object, ...]:
    assert result is not None
    return (
        result.status,
        result.stdout,
        result.stderr,
        result.exit_code,
        result.signal,
        result.truncated,
    )


PROGRAMS = VALID | INVALID | INVALID_AS_TEXT | REVEALING
for name in ("surrogate", "surrogate in a comment"):  # no bytes, so no token, hold one
    del PROGRAMS[name]
del PROGRAMS["open triple quote"]  # which the closing fence is inside of


@pytest.mark.parametrize("name", PROGRAMS)
def test_words_as_tokens(sandbox: NativeSandbox, name: str) -> None:
    text = written(PROGRAMS[name])
    trajectory = episode(sandbox, re.findall(r"\w+|\s+|.", text, re.DOTALL))
    (call,) = trajectory.tool_calls
    assert essence(call.result) == essence(sandbox.execute(call.code))


STATEMENTS = [
    *TYPICAL,
    "import math\n",
    "# only a comment\n",
    "x = [n * n for n in range(5)]\n",
    "print(sum(x), end='')\n",
    "for n in range(3):\n    print(n)\n\n    x = [n]\n",
    "while True:\n    break\nelse:\n    print('no')\n",
    "try:\n    print(1 // len(x))\nexcept NameError as e:\n    print(e)\nfinally:\n    pass\n",
    "@staticmethod\ndef f(a):\n    return a(1)\n",
    "s = '''a\nprint(1)\n'''\n",
    "print(\n    'é 日本 🎲',\n)\n",
    "assert len(s) > 10, 'short'\n",
    "raise SystemExit(3)\n",
    "1 / 0\n",
    "f(\n",
    "return 5\n",
    "import sys; print('err', file=sys.stderr)\n",
]


@settings(max_examples=60)
@given(data=st.data())
def test_any_tokens(shared: NativeSandbox, data: st.DataObject) -> None:
    code = "".join(data.draw(st.lists(st.sampled_from(STATEMENTS), max_size=6)))
    text = written(code, data.draw(st.sampled_from(["", "  "])))
    cuts = data.draw(st.sets(st.integers(1, len(text) - 1)))
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    watch, chunk = data.draw(st.sampled_from([(True, 1), (True, 4), (False, 1), (False, 4)]))
    trajectory = episode(shared, pieces, watch=watch, chunk_tokens=chunk)
    (call,) = trajectory.tool_calls
    assert essence(call.result) == essence(shared.execute(call.code))
    assert shared.stats()["dialogues"] == 0


LOOP = "n = 0\nfor i in range(10):\n    n += i\nprint(n)\n"


def test_only_what_may_take_long_is_begun_early(sandbox: NativeSandbox) -> None:
    def early(code: str) -> float:
        return episode(sandbox, list(written(code))).metrics["early_runs"]

    assert early(LOOP) == 1
    assert early("x = sum(range(9))\nprint(x)\n") == 1
    assert early("print(sum(range(9)))\n") == 0  # nothing follows that it could overlap
    assert early("x = 3\ny = x ** 2\nprint(x, y)\n") == 0
    assert early("import math\ndef f(x):\n    return g(x)\nprint(1)\n") == 0


def compared(waited_early_s: float, waited_whole_s: float) -> EarlyGain:
    gain = EarlyGain()
    for _ in range(8):
        gain.add(waited_early_s, early=True)
        gain.add(waited_whole_s, early=False)
    return gain


def test_blocks_begin_early_only_where_that_has_paid(sandbox: NativeSandbox) -> None:
    def early(gain: EarlyGain) -> list[float]:
        blocks = [episode(sandbox, list(written(LOOP)), gain=gain) for _ in range(4)]
        return [trajectory.metrics["early_runs"] for trajectory in blocks]

    assert early(EarlyGain()) == [1, 0, 1, 0]
    # The first one goes the other way.
    assert early(compared(0.1, 0.9)) == [0, 1, 1, 1]
    assert early(compared(0.9, 0.1)) == [1, 0, 0, 0]


def test_one_in_sixteen_goes_the_other_way() -> None:
    pays, does_not = compared(0.1, 0.2), compared(0.001, 0.002)
    assert [pays.begin() for _ in range(160)].count(False) == 10
    assert [does_not.begin() for _ in range(160)].count(True) == 10


def test_the_answer_follows_what_is_waited_for() -> None:
    gain = compared(0.001, 0.002)
    for _ in range(64):
        gain.add(0.5, early=False)
    assert [gain.begin() for _ in range(3)] == [False, True, True]
    # One that ran into its limit counts as a second, not as thirty.
    gain = compared(0.1, 0.1)
    for _ in range(56):
        gain.add(0.1, early=False)
    gain.add(30.0, early=False)
    assert [gain.begin() for _ in range(3)] == [False, True, True]
    gain.add(30.0, early=True)
    assert [gain.begin() for _ in range(3)] == [False, False, False]


def test_only_blocks_that_could_begin_early_are_compared(sandbox: NativeSandbox) -> None:
    gain = EarlyGain()
    for code in ("print(1)\n", LOOP, "print(sum(range(9)))\n"):
        episode(sandbox, list(written(code)), gain=gain)
    # The one that could was the first asked about, so the next is the second.
    assert [gain.begin() for _ in range(3)] == [False, True, False]


class _Gated(ScriptedEngine):
    """Goes on past token ``gate`` once ``ready()``."""

    def __init__(
        self, pieces: Sequence[str], gate: int, ready: Callable[[], bool], until: Until
    ) -> None:
        super().__init__(scripts(pieces))
        self._gate, self._ready, self._until = gate, ready, until

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        n_tokens = 0
        async for chunk in super().generate(request):
            n_tokens += 1
            yield chunk
            if n_tokens == self._gate:
                await self._until(self._ready)


def test_it_runs_while_the_block_is_written(sandbox: NativeSandbox, until: Until) -> None:
    pieces = list(written(LOOP + "print('more')\n"))
    before = sandbox.stats()["submitted"]

    def loop_is_through() -> bool:
        stats = sandbox.stats()
        return stats["submitted"] > before and stats["submitted"] == stats["completed"]

    engine = _Gated(pieces, len(pieces) - len("more')\n```\n"), loop_is_through, until)
    trajectory = asyncio.run(run(sandbox, pieces, ExecutionLimits(), engine))
    (call,) = trajectory.tool_calls
    assert call.result is not None
    assert (call.result.status, call.result.stdout) == (Status.OK, "45\nmore\n")
    assert trajectory.metrics["early_runs"] == 1


def test_a_late_syntax_error_is_all_there_is(sandbox: NativeSandbox) -> None:
    trajectory = episode(sandbox, list(written("print(len('x'))\n" + LOOP + "x = )\n")))
    result = trajectory.tool_calls[0].result
    assert result is not None
    assert (result.status, result.stdout) == (Status.ERROR, "")
    assert result.stderr.endswith("SyntaxError: unmatched ')'\n")
    assert trajectory.metrics["early_runs"] == 1


def test_limits_hold(sandbox: NativeSandbox) -> None:
    limits = ExecutionLimits(timeout_s=0.3)
    code = "print('a')\nwhile True:\n    pass\nprint('b')\n"
    trajectory = episode(sandbox, list(written(code)), limits)
    whole = sandbox.execute(ExecutionRequest(code, timeout_s=0.3))
    assert essence(trajectory.tool_calls[0].result) == essence(whole)
    assert whole.status is Status.TIMEOUT


def test_a_block_that_is_never_closed_leaves_nothing(sandbox: NativeSandbox) -> None:
    endless = "```python\nwhile True:\n    pass\nprint(1)\n"
    trajectory = episode(sandbox, list(endless))
    assert (trajectory.stop_reason, trajectory.tool_calls) == (StopReason.EOS, [])
    assert sandbox.stats()["dialogues"] == 0


def test_cancelling_leaves_nothing(sandbox: NativeSandbox, until: Until) -> None:
    pieces = list("```python\nwhile True:\n    pass\nprint(1)\n# and on")
    trajectory = Trajectory(PROMPT)

    async def main() -> None:
        engine = _Gated(pieces, len(pieces) - 3, lambda: False, until)
        task = asyncio.create_task(run(sandbox, pieces, ExecutionLimits(), engine, trajectory))
        await until(lambda: sandbox.stats()["running"] > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert trajectory.stop_reason is StopReason.CANCELLED
    assert sandbox.stats()["dialogues"] == 0


def test_without_room_for_a_stream_the_block_runs_whole() -> None:
    with NativeSandbox(slots=1, max_dialogues=1) as sandbox, sandbox.open():
        trajectory = episode(sandbox, list(written(LOOP)))
    assert trajectory.tool_calls[0].result is not None
    assert trajectory.tool_calls[0].result.stdout == "45\n"
    assert trajectory.metrics["early_runs"] == 0
