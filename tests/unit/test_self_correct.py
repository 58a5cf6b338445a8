"""Self-correction over many prompts, on engines with KV to truncate and without."""

from __future__ import annotations

import pytest

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.openai import OpenAIEngine
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.inference import CorrectionCounts, count_corrections, self_correct
from thor_fast.rollout import BacktrackPolicy, ObservationEncoder, Prompt, Renderer, RolloutLimits
from thor_fast.tools import PythonTool
from thor_fast.types import (
    Attempt,
    ExecutionResult,
    RolloutGroup,
    Segment,
    Status,
    StopReason,
    TokenSource,
    ToolCall,
    Trajectory,
)

from .completions_server import CompletionsServer

EOS = 1
BAD, GOOD = "```py\nbad\n```", "```py\ngood\n```"
RESULTS = {
    "bad\n": ExecutionResult(Status.ERROR, stderr="NameError: bad"),
    "good\n": ExecutionResult(Status.OK, "42"),
    "infra\n": ExecutionResult(Status.INFRA, error="x"),
}


@pytest.fixture
def run(tokenizers, fake_sandbox):
    tokenizer = tokenizers.bytes

    def start(engine, prompts, policy, **options):
        return self_correct(
            engine, fake_sandbox(lambda c: RESULTS[c]), PythonTool(tokenizer), prompts, policy,
            encode=ObservationEncoder(tokenizer), limits=RolloutLimits(),
            sampling=SamplingParams(seed=5), eos_token_ids=frozenset({EOS}), **options,
        )  # fmt: skip

    start.ids = lambda text: tuple(tokenizer.encode(text).ids)
    start.text = Renderer(tokenizer).text
    return start


async def test_groups_and_counts(run) -> None:
    """This engine says the same under every seed: what fails does so to the end."""
    engine = ScriptedEngine(
        {
            (100,): [Script(run.ids(f"{GOOD}{BAD}x<|im_end|>"))],
            (101,): [Script(run.ids(f"{GOOD}<|im_end|>"))],
            (102,): [Script(run.ids("```py\ninfra\n```"))],
        }
    )
    done = []
    groups, counts = await run(
        engine,
        [Prompt((i,), "ref", f"task{i}") for i in (100, 101, 102)],
        BacktrackPolicy(l_suf=0, attempts_per_call=2),
        group_size=2,
        reward=lambda t, _: float(len(t.tool_calls)),
        progress=lambda *event: done.append(event[1:]),
    )
    assert [g.task_id for g in groups] == ["task100", "task101", "task102"]
    assert [g.rewards for g in groups] == [[2.0, 2.0], [1.0, 1.0], [None, None]]
    assert counts == CorrectionCounts(
        places=6, first_failed=2, recovered=0, given_up=2, attempts=4,
        rolled_back_tokens=4 * len(BAD),
    )  # fmt: skip
    assert counts.first_pass_rate == counts.final_pass_rate == 4 / 6
    assert sorted(done) == [(n, 6) for n in range(1, 7)]
    assert engine.kv_budget.live_sequences == 0


async def test_an_engine_behind_http_corrects_by_sending_what_is_left_again(run) -> None:
    pytest.importorskip("httpx2")
    kept, first, second = (
        run.ids("so"),
        run.ids(f"so\n{BAD}more"),
        run.ids(f"it\n{GOOD}42<|im_end|>"),
    )
    observed = run.ids("\n```output\n42\n```\n")

    def say(body, index):
        if len(server.bodies) == 1:
            return first[index]
        written = len(body["prompt"]) - 1 - len(kept)
        return second[written - len(observed) * (written > 0) + index]

    server = CompletionsServer(say)
    async with server.serving() as url:
        engine = OpenAIEngine(url, model="tiny", max_sequences=2, max_context=256)
        groups, counts = await run(engine, [Prompt((65,))], BacktrackPolicy(l_suf=1))
        sessions = engine.kv_budget.live_sequences
        await engine.aclose()
    (t,) = groups[0].trajectories
    assert t.stop_reason is StopReason.EOS
    assert run.text(t.response_ids) == f"soit\n{GOOD}\n```output\n42\n```\n42<|im_end|>"
    assert counts == CorrectionCounts(1, 1, 1, 0, 1, len(f"\n{BAD}"))
    assert (counts.first_pass_rate, counts.final_pass_rate) == (0.0, 1.0)
    assert [b["prompt"][:4] for b in server.bodies[:2]] == [[65], [65, *kept]]
    assert server.bodies[0]["seed"] != server.bodies[1]["seed"]
    assert sessions == 0


def test_counts_tell_every_ending_of_a_place_apart() -> None:
    def call(status: Status | None, attempt: int) -> ToolCall:
        return ToolCall("x", 0, 1, None if status is None else ExecutionResult(status), "", attempt)

    def gone(index: int, attempt: int) -> Attempt:
        parts = (Segment(TokenSource.TOOL, (7,)), Segment(TokenSource.MODEL, (5, 5), (-1.0, -1.0)))
        return Attempt(0, parts, call(Status.ERROR, attempt), index)

    ok, bad, infra = Status.OK, Status.ERROR, Status.INFRA
    trajectories = [
        Trajectory((1,), tool_calls=[call(ok, 0), call(bad, 0)]),
        Trajectory((1,), tool_calls=[call(ok, 2)], attempts=[gone(0, 0), gone(0, 1)]),
        Trajectory((1,), tool_calls=[call(bad, 0)], attempts=[gone(0, 1), gone(0, 2)]),
        Trajectory((1,), tool_calls=[call(ok, 0)], attempts=[gone(1, 0)]),  # no call there then
        Trajectory((1,), tool_calls=[call(infra, 1)], attempts=[gone(0, 0)]),
        Trajectory((1,), tool_calls=[call(infra, 0), call(None, 0)]),
    ]
    counts = count_corrections([RolloutGroup((1,), trajectories)])
    assert counts == CorrectionCounts(
        places=7, first_failed=5, recovered=1, given_up=2, attempts=6, rolled_back_tokens=12
    )
    assert counts.first_pass_rate == 2 / 7
    assert counts.final_pass_rate == 3 / 7
    empty = count_corrections([])
    assert (empty, empty.first_pass_rate, empty.final_pass_rate) == (CorrectionCounts(), None, None)
