"""Cutting, rolling back and putting back: laws of token ids, masks, log-probs and seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.errors import ConfigError, DataError
from thor_fast.rollout.backtrack import (
    BacktrackPolicy,
    attempts_at,
    beginning,
    cut_position,
    restore_best,
    retry_position,
    roll_back,
    tail,
)
from thor_fast.types import (
    ExecutionResult,
    Segment,
    Status,
    TokenSource,
    ToolCall,
    Trajectory,
)

MODEL, TOOL = TokenSource.MODEL, TokenSource.TOOL
FAILED = ExecutionResult(Status.ERROR, stderr="NameError: x")
NO_HINT = Segment(TOOL, ())


def sampled(n: int, rng) -> Segment:
    """``n`` tokens; no two log-probs are equal, so that none can take another's place unseen."""
    ids = tuple(rng.randrange(1000) for _ in range(n))
    return Segment(MODEL, ids, tuple(-rng.random() - 0.001 for _ in range(n)))


def write_call(t: Trajectory, reasoning: int, block: int, rng, attempt: int = 0) -> ToolCall:
    """The model writes ``reasoning`` tokens and a block of ``block``, which fails."""
    start = len(t) + reasoning
    t.append(sampled(reasoning + block, rng))
    t.tool_calls.append(ToolCall("x\n", start, start + block, FAILED, attempt=attempt))
    return t.tool_calls[-1]


@st.composite
def episodes(draw) -> tuple[Trajectory, ToolCall, object]:
    """Ends in a failed call; before it up to three others with their observations."""
    rng = draw(st.randoms(use_true_random=False))
    t = Trajectory(tuple(range(draw(st.integers(1, 4)))), seed=draw(st.integers(0, 2**63 - 1)))
    for _ in range(draw(st.integers(0, 3))):
        write_call(t, draw(st.integers(0, 4)), draw(st.integers(1, 4)), rng)
        t.append(Segment(TOOL, tuple(range(draw(st.integers(1, 4))))))
    return t, write_call(t, draw(st.integers(0, 6)), draw(st.integers(1, 4)), rng), rng


def rows(t: Trajectory) -> list[tuple[int, int, float, int]]:
    """Per token: id, mask, log-prob, the seed it was drawn from (0 where it was not)."""
    ids, mask, logprobs = t.token_ids, t.loss_mask.tolist(), t.sampling_logprobs.tolist()
    assert len(ids) == len(mask) == len(logprobs) == len(t)
    seeds = [t.seed_at(i) * m for i, m in enumerate(mask)]
    return list(zip(ids, mask, logprobs, seeds, strict=True))


@settings(deadline=None, max_examples=50)
@given(episodes(), st.integers(0, 12))
def test_a_cut_lies_in_the_models_run_before_the_block(episode, l_suf) -> None:
    t, call, _ = episode
    cut = cut_position(t, call, l_suf)
    run = t.loss_mask[cut : call.start]
    assert run.all()  # neither prompt nor observation is cut away
    assert len(t.prompt_ids) <= cut <= call.start
    assert call.start - cut <= l_suf
    if call.start - cut < l_suf:  # then there was nothing more of the model's to cut
        assert cut == len(t.prompt_ids) or t.loss_mask[cut - 1] == 0


@settings(deadline=None, max_examples=50)
@given(episodes(), st.integers(0, 12), st.integers(0, 3))
def test_a_rollback_moves_tokens_masks_log_probs_and_seeds_together(episode, l_suf, hint) -> None:
    t, call, rng = episode
    before, n_calls = rows(t), len(t.tool_calls)
    cut = cut_position(t, call, l_suf)
    roll_back(t, cut, Segment(TOOL, (7,) * hint))
    new_seed = t.seed_at(len(t))
    assert new_seed != t.seed
    assert len(t.tool_calls) == n_calls - 1
    retry = write_call(t, 2, 1, rng, attempt=1)
    after = rows(t)
    assert after[:cut] == before[:cut]
    assert after[cut : cut + hint] == [(7, 0, 0.0, 0)] * hint
    assert [(m, s) for _, m, _, s in after[cut + hint :]] == [(1, new_seed)] * 3
    (attempt,) = t.attempts
    assert (attempt.cut, attempt.call, attempt.call_index) == (cut, call, n_calls - 1)
    gone = [(i, p) for s in attempt.segments for i, p in zip(s.token_ids, s.logprobs, strict=True)]
    assert gone == [(i, p) for i, _, p, _ in before[cut:]]
    assert attempts_at(t, n_calls - 1) == [attempt]
    assert retry.attempt == 1


@settings(deadline=None, max_examples=50)
@given(episodes(), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.booleans(), st.data())
def test_the_best_try_comes_back_as_it_was(episode, l_sufs, hints, data) -> None:
    t, _, rng = episode
    place = len(t.tool_calls) - 1
    states = [(rows(t), t.tool_calls[-1])]
    for n, l_suf in enumerate(l_sufs, 1):
        cut = retry_position(t, BacktrackPolicy(l_suf=l_suf))
        roll_back(t, cut, Segment(TOOL, (7,) * (hints * data.draw(st.integers(0, 2)))))
        write_call(t, data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3)), rng, attempt=n)
        states.append((rows(t), t.tool_calls[-1]))
    floor = min(a.cut for a in t.attempts)

    def mean(state) -> float:
        written = [p for _, m, p, _ in state[0][floor:] if m]
        return sum(written) / len(written)

    chosen = max(reversed(states), key=mean)
    changed_from = restore_best(t)
    assert (rows(t), t.tool_calls[-1]) == chosen
    assert changed_from == (None if chosen is states[-1] else floor)
    # Every try is there once, so that seeds of further ones cannot repeat.
    others = [a.call for a in attempts_at(t, place)]
    assert sorted(c.attempt for c in [*others, t.tool_calls[-1]]) == list(range(len(states)))


@settings(deadline=None, max_examples=50)
@given(episodes(), st.data())
def test_a_tail_completes_a_beginning(episode, data) -> None:
    t, _, _ = episode
    t.attempts, t.reward, t.metrics = [], 1.0, {"a": 1.0}
    length = data.draw(st.integers(len(t.prompt_ids), len(t)))
    first = beginning(t, length)
    assert rows(first) == rows(t)[:length]
    assert (first.reward, first.metrics, first.stop_reason) == (None, {}, None)
    for segment in tail(t, length):
        first.append(segment)
    assert first.segments == t.segments
    assert len(first.tool_calls) <= len(t.tool_calls)


def test_a_beginning_has_the_attempts_that_were_made_by_then() -> None:
    t = Trajectory((1,))
    t.append(Segment(MODEL, tuple(range(10)), (-1.0,) * 10))
    t.tool_calls.append(ToolCall("x", 8, 11, FAILED))
    roll_back(t, 6, NO_HINT)
    t.append(Segment(MODEL, tuple(range(5)), (-1.0,) * 5))
    t.tool_calls.append(ToolCall("x", 8, 11, FAILED, attempt=1))
    roll_back(t, 4, NO_HINT)
    t.append(Segment(MODEL, tuple(range(7)), (-1.0,) * 7))
    assert [len(beginning(t, n).attempts) for n in (3, 4, 5, 7, 11)] == [0, 2, 2, 2, 2]
    assert beginning(t, 3).seed_at(3) == t.seed
    assert beginning(t, 4).seed_at(4) == t.seed_at(4) != t.seed


def test_growth_and_budgets() -> None:
    policy = BacktrackPolicy(l_suf=2, growth=3, attempts_per_call=3, attempts_in_all=4)
    t = Trajectory((1,))
    cuts = []
    for attempt in range(4):
        t.append(Segment(MODEL, (5,) * (20 - len(t)), (-1.0,) * (20 - len(t))))
        t.tool_calls.append(ToolCall("x", 18, 20, FAILED, attempt=attempt))
        if not policy.allows(t):
            break
        cuts.append(retry_position(t, policy))
        roll_back(t, cuts[-1], NO_HINT)
    assert cuts == [16, 13, 10]
    t.append(Segment(TOOL, (9,)))
    t.append(Segment(MODEL, (5, 5), (-1.0, -1.0)))
    t.tool_calls.append(ToolCall("y", 21, 23, FAILED))
    assert policy.allows(t)
    roll_back(t, retry_position(t, policy), NO_HINT)
    t.tool_calls.append(ToolCall("y", 21, 23, FAILED, attempt=1))
    assert not policy.allows(t)  # four in all


def test_a_cut_passes_over_the_hint() -> None:
    t = Trajectory((1,))
    t.append(Segment(MODEL, (5,) * 9, (-1.0,) * 9))
    t.tool_calls.append(ToolCall("x", 8, 10, FAILED))
    roll_back(t, 6, Segment(TOOL, (7, 7)))
    t.append(Segment(MODEL, (6,) * 4, (-1.0,) * 4))
    t.tool_calls.append(ToolCall("x", 10, 12, FAILED, attempt=1))
    cuts = [retry_position(t, BacktrackPolicy(l_suf=n)) for n in (0, 2, 3, 5, 99)]
    assert cuts == [6, 6, 5, 3, 1]  # two tokens of the model's lie behind the hint


def test_seeds_of_tries_differ() -> None:
    t = Trajectory((1,), seed=3)
    seeds = {t.seed}
    for n in range(50):
        t.append(Segment(MODEL, (5, 5), (-1.0, -1.0)))
        t.tool_calls.append(ToolCall("x", 2, 3, FAILED, attempt=n))
        roll_back(t, 1, NO_HINT)
        seeds.add(t.seed_at(1))
    assert len(seeds) == 51
    again = replace(t, reseeded=[], attempts=[])
    again.append(Segment(MODEL, (5, 5), (-1.0, -1.0)))
    again.tool_calls.append(ToolCall("x", 2, 3, FAILED))
    roll_back(again, 1, NO_HINT)
    assert again.attempts[0].reseeded == ()
    assert again.seed_at(1) in seeds  # a pure function of seed and number


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_call_outside_the_models_tokens_cannot_be_cut(start) -> None:
    t = Trajectory((1,))
    t.append(Segment(MODEL, (5, 5), (-1.0, -1.0)))
    t.append(Segment(TOOL, (7, 7)))
    with pytest.raises(DataError, match=f"call starts at token {start}, expected a token of the"):
        cut_position(t, ToolCall("x", start, start + 1), 1)


def test_wrong_settings_are_named() -> None:
    t = Trajectory((1,))
    with pytest.raises(DataError, match="l_suf is -1, expected >= 0"):
        cut_position(t, ToolCall("x", 1, 2), -1)
    for values, message in [
        ({"l_suf": -1}, "l_suf is -1, expected >= 0"),
        ({"growth": -2}, "growth is -2, expected >= 0"),
        ({"attempts_per_call": 0}, "attempts_per_call is 0, expected >= 1"),
        ({"attempts_in_all": 0}, "attempts_in_all is 0, expected >= 1"),
        ({"keep": "first"}, "keep is 'first', expected 'last' or 'best'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            BacktrackPolicy(**values)
    with pytest.raises(ConfigError, match="a greedy retry writes the same again"):
        BacktrackPolicy().check(0.0)
    BacktrackPolicy(hint=True).check(0.0)
    BacktrackPolicy().check(0.6)
