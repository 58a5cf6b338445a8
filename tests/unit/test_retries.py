"""Self-correction inside the loop: what is rolled back, what goes on, and what is kept."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script
from thor_fast.errors import ConfigError, DataError
from thor_fast.rollout import ObservationEncoder, Renderer, RolloutLimits, run_episode
from thor_fast.rollout.backtrack import BacktrackPolicy, beginning
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, Status, StopReason, Trajectory

from .reseeded_engine import ReseededEngine

PROMPT = (65, 66)
EOS = 1
BAD, GOOD = "```py\nbad\n```", "```py\ngood\n```"
RESULTS = {
    "bad\n": ExecutionResult(Status.ERROR, stderr="NameError: bad"),
    "good\n": ExecutionResult(Status.OK, "42"),
    "infra\n": ExecutionResult(Status.INFRA, error="clone: EAGAIN"),
}
ERROR = "\n```output\nNameError: bad\n```\n"
ANSWER = "\n```output\n42\n```\n"


@pytest.fixture
def correct(tokenizers, fake_sandbox):
    """Runs one episode; the k-th text is what the model writes under its k-th seed."""
    tokenizer = tokenizers.bytes

    def run(*texts, policy, logprobs=None, sandbox=None, limits=None, trajectory=None, **options):
        ids = [tuple(tokenizer.encode(text).ids) for text in texts]
        each = logprobs or [-0.5] * len(texts)
        scripts = [Script(i, (p,) * len(i)) for i, p in zip(ids, each, strict=True)]
        run.engine = ReseededEngine(options.pop("context", PROMPT), scripts, **options)
        run.sandbox = sandbox or fake_sandbox(lambda code: RESULTS[code])
        return run_episode(
            run.engine, run.sandbox, PythonTool(tokenizer), PROMPT, limits or RolloutLimits(),
            encode=ObservationEncoder(tokenizer), sampling=SamplingParams(seed=7),
            eos_token_ids=frozenset({EOS}), session="s", backtrack=policy, trajectory=trajectory,
        )  # fmt: skip

    run.text = Renderer(tokenizer).text
    return run


@pytest.mark.parametrize(("watch", "chunk"), [(True, 1), (True, 7), (False, 1), (False, 7)])
async def test_a_failed_call_is_taken_back_and_written_again(correct, watch, chunk) -> None:
    t = await correct(
        f"think so\n{BAD}dropped", f"it\n{GOOD}42<|im_end|>", policy=BacktrackPolicy(l_suf=3),
        watch=watch, chunk_tokens=chunk,
    )  # fmt: skip
    assert t.stop_reason is StopReason.EOS
    assert correct.text(t.response_ids) == f"think it\n{GOOD}{ANSWER}42<|im_end|>"
    (call,) = t.tool_calls
    assert (call.code, call.passed, call.attempt) == ("good\n", True, 1)
    assert correct.text(t.token_ids[call.start : call.end]) == GOOD
    (attempt,) = t.attempts
    assert attempt.cut == len(PROMPT) + len("think ")
    assert correct.text(attempt.segments[0].token_ids) == f"so\n{BAD}"
    assert (attempt.call.code, attempt.call.passed, attempt.call_index) == ("bad\n", False, 0)
    assert attempt.cut in correct.engine.cuts
    assert t.metrics["attempts"] == t.metrics["recovered_calls"] == 1
    assert t.metrics["rolled_back_tokens"] == len(f"so\n{BAD}")
    assert correct.engine.kv_budget.live_sequences == 0
    # The noise of what stays and of what is new, as the engine was asked for it.
    assert t.seed_at(attempt.cut - 1) == 7 == correct.engine.seeds[0]
    assert {t.seed_at(p) for p in range(attempt.cut, len(t))} == {correct.engine.seeds[-1]}


async def test_without_a_policy_nothing_is_taken_back(correct) -> None:
    t = await correct(f"so\n{BAD}hm<|im_end|>", policy=None)
    assert correct.text(t.response_ids) == f"so\n{BAD}{ERROR}hm<|im_end|>"
    assert (t.attempts, t.reseeded, correct.engine.cuts) == ([], [], [])


async def test_tries_at_one_place_are_bounded_and_the_last_goes_on(correct) -> None:
    policy = BacktrackPolicy(l_suf=0, attempts_per_call=2)
    t = await correct(
        f"1\n{BAD}", f"2\n{BAD}", f"3\n{BAD}x\n{BAD}", f"4\n{GOOD}<|im_end|>", policy=policy
    )
    # Once there is an answer the next call is another place.
    assert correct.text(t.response_ids) == f"1\n2\n3\n{BAD}{ERROR}x\n4\n{GOOD}{ANSWER}<|im_end|>"
    assert [(c.passed, c.attempt) for c in t.tool_calls] == [(False, 2), (True, 1)]
    assert [a.call_index for a in t.attempts] == [0, 0, 1]


async def test_tries_in_all_are_bounded(correct) -> None:
    policy = BacktrackPolicy(l_suf=0, attempts_per_call=5, attempts_in_all=3)
    t = await correct(
        f"{BAD}", f"{GOOD}a\n{BAD}", f"{BAD}", f"{BAD}b\n{BAD}<|im_end|>", policy=policy
    )
    assert [(c.passed, c.attempt) for c in t.tool_calls] == [(True, 1), (False, 2), (False, 0)]
    assert (len(t.attempts), t.metrics["attempts"]) == (3, 3)


@pytest.mark.parametrize(
    ("logprobs", "kept"),
    [((-3.0, -1.0, -2.0), "2"), ((-1.0, -1.0, -1.0), "3"), ((-1.0, -2.0, -3.0), "1")],
)
async def test_the_likeliest_try_can_be_kept(correct, logprobs, kept) -> None:
    policy = BacktrackPolicy(l_suf=2, attempts_per_call=2, keep="best")
    texts = {k: f"{k}\n{BAD}" for k in "123"}
    if kept == "3":
        texts["3"] += "so<|im_end|>"
    t = await correct(*texts.values(), "so<|im_end|>", policy=policy, logprobs=(*logprobs, -0.5))
    assert correct.text(t.response_ids) == f"{kept}\n{BAD}{ERROR}so<|im_end|>"
    assert t.tool_calls[0].attempt == int(kept) - 1
    assert sorted(a.call.attempt for a in t.attempts) == sorted({0, 1, 2} - {int(kept) - 1})
    n_kept = len(f"{kept}\n{BAD}")
    assert set(t.sampling_logprobs[len(PROMPT) :][:n_kept]) == {logprobs[int(kept) - 1]}
    assert t.seed_at(len(PROMPT)) == list(dict.fromkeys(correct.engine.seeds))[int(kept) - 1]


async def test_the_error_as_a_hint(correct) -> None:
    policy = BacktrackPolicy(l_suf=2, hint=True)
    t = await correct(f"one\n{BAD}", f"two\n{BAD}", f"3\n{GOOD}<|im_end|>", policy=policy)
    text = f"on{ERROR}3\n{GOOD}{ANSWER}<|im_end|>"
    assert correct.text(t.response_ids) == text  # one hint, that of the last failure
    assert [(a.cut, a.hint) for a in t.attempts] == [(len(PROMPT) + 2, len(ERROR))] * 2
    sampled = [i for i, m in zip(t.token_ids, t.loss_mask, strict=True) if m]
    assert correct.text(sampled) == f"on3\n{GOOD}<|im_end|>"


@pytest.mark.parametrize("room", [0, 1])
async def test_a_hint_that_leaves_no_room_is_left_out(correct, room) -> None:
    limits = RolloutLimits(max_response_tokens=len(f"1\n{ERROR}") + room)
    policy = BacktrackPolicy(l_suf=0, hint=True)
    t = await correct(f"1\n{BAD}", "x" * 99, policy=policy, limits=limits)
    assert t.attempts[0].hint == len(ERROR) * room
    said = f"{ERROR}x" if room else "x" * len(ERROR)
    assert correct.text(t.response_ids) == f"1\n{said}"
    assert t.stop_reason is StopReason.MAX_TOKENS


async def test_what_infrastructure_does_is_no_failure_of_the_call(correct) -> None:
    policy = BacktrackPolicy(l_suf=0)
    t = await correct("```py\ninfra\n```", policy=policy)
    assert (t.stop_reason, t.attempts) == (StopReason.TOOL_FAILURE, [])
    t = await correct(BAD, "```py\ninfra\n```", policy=policy)
    assert (t.stop_reason, len(t.attempts)) == (StopReason.TOOL_FAILURE, 1)
    assert t.tool_calls[0].passed is None


async def test_budgets_count_what_is_there(correct) -> None:
    """Tokens and calls that were taken back use up neither budget."""
    n = len(f"{GOOD}{ANSWER}")
    limits = RolloutLimits(max_response_tokens=n + 1, max_tool_calls=1)
    policy = BacktrackPolicy(l_suf=0)
    t = await correct(BAD, BAD, f"{GOOD}<|im_end|>", policy=policy, limits=limits)
    assert t.stop_reason is StopReason.EOS
    assert len(t.attempts) == 2
    t = await correct(BAD, GOOD + BAD, policy=policy, limits=RolloutLimits(max_tool_calls=1))
    assert t.stop_reason is StopReason.MAX_TOOL_CALLS
    assert len(t.attempts) == 1


async def test_a_retry_may_do_without_a_call(correct) -> None:
    t = await correct(BAD, "42<|im_end|>", policy=BacktrackPolicy(l_suf=0))
    assert (t.stop_reason, t.tool_calls, len(t.attempts)) == (StopReason.EOS, [], 1)
    assert "recovered_calls" not in t.metrics


async def test_cancelled_in_a_retry(correct, fake_sandbox, until) -> None:
    class Slow(fake_sandbox):
        async def submit(self, request):
            self.delay_s = 60.0 if request.code == "good\n" else 0.0
            return await super().submit(request)

    trajectory = Trajectory(PROMPT)
    sandbox = Slow(lambda code: RESULTS[code])
    task = asyncio.create_task(
        correct(BAD, GOOD, policy=BacktrackPolicy(l_suf=0), sandbox=sandbox, trajectory=trajectory)
    )
    await until(lambda: sandbox.delay_s == 60.0 and sandbox.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trajectory.stop_reason is StopReason.CANCELLED
    assert correct.text(trajectory.response_ids) == GOOD
    assert (len(trajectory.attempts), trajectory.metrics["attempts"]) == (1, 1)
    assert correct.engine.kv_budget.live_sequences == 0


@settings(deadline=None, max_examples=60)
@given(
    outcomes=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=5),
    l_suf=st.integers(0, 12),
    growth=st.integers(0, 5),
    hint=st.booleans(),
    keep=st.sampled_from(["last", "best"]),
    watch=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_rolled_back_nothing_gets_out_of_step(
    tokenizers, fake_sandbox, outcomes, l_suf, growth, hint, keep, watch, seed
) -> None:
    """Every token has the log-prob it was sampled with, and a call lies where it says."""
    rng = random.Random(seed)
    tokenizer = tokenizers.bytes
    texts = ["a" * n + "\n" + (GOOD if good else BAD) for good, n in outcomes]
    ids = [tuple(tokenizer.encode(text).ids) for text in (*texts, *["x" * 999] * 9)]
    scripts = [Script(i, tuple(-1 - rng.random() for _ in i)) for i in ids]
    engine = ReseededEngine(PROMPT, scripts, watch=watch, chunk_tokens=rng.randint(1, 40))
    policy = BacktrackPolicy(
        l_suf, growth, attempts_per_call=2, attempts_in_all=6, hint=hint, keep=keep
    )
    t = asyncio.run(
        run_episode(
            engine, fake_sandbox(lambda code: RESULTS[code]), PythonTool(tokenizer), PROMPT,
            RolloutLimits(max_response_tokens=400), encode=ObservationEncoder(tokenizer),
            sampling=SamplingParams(seed=7), eos_token_ids=frozenset({EOS}), session="s",
            backtrack=policy,
        )
    )  # fmt: skip
    token_ids, mask, logprobs = t.token_ids, t.loss_mask, t.sampling_logprobs
    assert len(token_ids) == len(mask) == len(logprobs) == len(t)
    assert ((logprobs < 0) == (mask == 1)).all()
    known = {p: i for s in scripts for i, p in zip(s.token_ids, s.logprobs, strict=True)}
    assert all(known[p] == i for i, p in zip(token_ids, logprobs, strict=True) if p)
    text = Renderer(tokenizer).text
    for call in t.tool_calls:
        assert text(token_ids[call.start : call.end]) == f"```py\n{call.code}```"
        assert mask[call.start : call.end].all()
    assert engine.kv_budget.live_sequences == 0
    assert len(t.attempts) <= 6
    for attempt in t.attempts:
        gone = [i for s in attempt.segments for i in s.token_ids]
        assert attempt.call.passed is False
        assert text(gone[attempt.call.start - attempt.cut :]) == BAD


async def test_an_episode_goes_on_from_where_it_was_cut(correct) -> None:
    whole = await correct(f"a\n{GOOD}b\n{GOOD}end<|im_end|>", policy=None)
    second = whole.tool_calls[1]
    for length, said in [
        (second.start - 2, f"b\n{GOOD}end<|im_end|>"),
        (second.start + 7, "ood\n```end<|im_end|>"),  # within the block
        (second.end, "end<|im_end|>"),  # it is run again
        (len(whole) - 4, "end<|im_end|>"),
    ]:
        start = beginning(whole, length)
        context = tuple(whole.token_ids[: length + len(ANSWER) * (length == second.end)])
        again = await correct(said, policy=None, trajectory=start, context=context)
        assert again is start
        assert again.token_ids == whole.token_ids
        assert again.tool_calls == whole.tool_calls
        assert again.segments == whole.segments
        assert again.stop_reason is StopReason.EOS


async def test_an_episode_that_has_ended_does_not_go_on(correct) -> None:
    whole = await correct("x<|im_end|>", policy=None)
    with pytest.raises(DataError, match=r"the stop reason StopReason.EOS, expected"):
        await correct("x", policy=None, trajectory=whole)


async def test_a_greedy_retry_is_refused(tokenizers, fake_sandbox) -> None:
    with pytest.raises(ConfigError, match="temperature is 0, expected > 0 or a hint"):
        await run_episode(
            ReseededEngine(PROMPT, [Script((EOS,))]), fake_sandbox(), PythonTool(tokenizers.bytes),
            PROMPT, RolloutLimits(), encode=list, sampling=SamplingParams(temperature=0.0),
            eos_token_ids=frozenset({EOS}), session="s", backtrack=BacktrackPolicy(),
        )  # fmt: skip


class _Stream:
    def __init__(self, sandbox) -> None:
        self._sandbox = sandbox
        self.text, self.closed = "", False

    def feed(self, text: str) -> None:
        self.text += text

    async def afinish(self, rest: str = "") -> ExecutionResult:
        self.text += rest
        return self._sandbox.execute(self.text)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def streaming(fake_sandbox):
    """A sandbox that begins blocks early and fails those that divide; ``streams``, as opened."""

    class Streaming(fake_sandbox):
        def open(self, request=None):
            self.streams.append(_Stream(self))
            return self.streams[-1]

    made = Streaming(
        lambda code: ExecutionResult(Status.ERROR if "/" in code else Status.OK, stderr="E")
    )
    made.streams = []
    return made


def _block(last: str) -> str:
    """One that is begun early, since its loop may take a while."""
    return f"```py\nfor i in range(9):\n    f(i)\n{last}\n```"


async def test_each_try_has_an_early_run_of_its_own(correct, streaming) -> None:
    first, second, third = (_block(last) for last in ("x = 1 / 0", "y = 2 / 0", "z = 3"))
    t = await correct(
        f"1\n{first}", f"22\n{second}", f"3\n{third}so<|im_end|>",
        policy=BacktrackPolicy(l_suf=1), sandbox=streaming,
    )  # fmt: skip
    blocks = [block[len("```py\n") : -len("```")] for block in (first, second, third)]
    assert [s.text for s in streaming.streams] == blocks
    assert [r.code for r in streaming.requests] == blocks
    assert all(s.closed for s in streaming.streams)
    assert (t.metrics["early_runs"], t.metrics["attempts"], t.tool_calls[0].passed) == (3, 2, True)


async def test_going_on_runs_no_block_again(correct, streaming, monkeypatch) -> None:
    """Also where an observation had no tokens, so that the turn holds a block that has run."""
    monkeypatch.setattr(PythonTool, "observation", lambda *_: "")
    one, two = _block("a = 1"), _block("b = 2")
    whole = await correct(f"{one}\nand\n{two}\n<|im_end|>", policy=None, sandbox=streaming)
    assert len(whole.segments) == 1
    streaming.requests.clear()
    streaming.streams.clear()
    length = whole.tool_calls[1].start + len("```py\nfor i")
    start = beginning(whole, length)
    said = correct.text(whole.token_ids[length:])
    again = await correct(
        said, policy=None, sandbox=streaming, trajectory=start,
        context=tuple(whole.token_ids[:length]),
    )  # fmt: skip
    assert [r.code for r in streaming.requests] == [whole.tool_calls[1].code]
    assert [s.text for s in streaming.streams] == [whole.tool_calls[1].code]
    assert again.tool_calls == whole.tool_calls
