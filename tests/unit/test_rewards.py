"""Exact answers score 1, others 0, and what infrastructure spoilt is not scored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.errors import RewardError
from thor_fast.rewards import MathAnswerReward, RewardFunction
from thor_fast.rewards.math_answer import answers_match, last_boxed
from thor_fast.rollout import Renderer
from thor_fast.types import Segment, StopReason, TokenSource, ToolCall, Trajectory


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        ("boxed{1}", None),
        (r"\boxed 1", None),
        (r"\boxed{1\}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("42", "42"),
        ("042", "42"),
        ("+42", "42"),
        ("42.0", "42"),
        ("42.", "42"),
        ("-7", "\N{MINUS SIGN}7"),
        (".5", "1/2"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac12", "2/4"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"\frac{-1}{2}", "-1/2"),
        ("1,234,567", "1234567"),
        (r"1{,}234", "1234"),
        ("1\\,234", "1234"),
        ("1,234.50", "1234.5"),
        ("$10$", "10"),
        ("x + 1", "x+1"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("9" * 400, "9" * 400),
        ("a" * 5000, "a" * 5000),
    ],
)
def test_equal_answers(answer: str, reference: str) -> None:
    assert answers_match(answer, reference)
    assert answers_match(reference, answer)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("42", "43"),
        ("0.333", "1/3"),
        ("0.1", "0.10000000000000001"),
        ("1" * 30, "1" * 29 + "2"),
        ("12,34", "1234"),
        ("1,2", "12"),
        ("1/0", "2/0"),
        ("x", "X"),
        ("-7", "7"),
        ("", "0"),
        ("nan", "0"),
        (r"\leftarrow", "arrow"),
        ("1e3", "1000"),
        ("\u0664", "4"),  # an Arabic-Indic digit
    ],
)
def test_different_answers(answer: str, reference: str) -> None:
    assert not answers_match(answer, reference)
    assert not answers_match(reference, answer)


@given(st.integers(), st.integers(1, 10**9), st.integers(1, 99))
def test_a_fraction_equals_itself_expanded(top: int, bottom: int, factor: int) -> None:
    assert answers_match(f"{top}/{bottom}", rf"\frac{{{top * factor}}}{{{bottom * factor}}}")
    assert not answers_match(f"{top}/{bottom}", f"{top * factor + 1}/{bottom * factor}")


@given(st.integers(-(10**30), 10**30))
def test_thousands_separators_change_nothing(number: int) -> None:
    assert answers_match(f"{number:,}", str(number))
    assert not answers_match(f"{number:,}", str(number + 1))


@pytest.fixture
def reward(tokenizers) -> MathAnswerReward:
    return MathAnswerReward(Renderer(tokenizers.bytes))


@pytest.fixture
def said(tokenizers):
    def make(text: str, stop: StopReason | None = StopReason.EOS) -> Trajectory:
        ids = tuple(tokenizers.bytes.encode(text).ids)
        t = Trajectory((5,), [Segment(TokenSource.MODEL, ids, (-1.0,) * len(ids))])
        t.stop_reason = stop
        return t

    return make


def test_scores(reward: RewardFunction, said) -> None:
    assert reward(said(r"\boxed{42}"), "42") == 1.0
    assert reward(said(r"\boxed{41}"), "42") == 0.0
    assert reward(said("42"), "42") == 0.0
    assert reward(said(r"\boxed{42}", StopReason.MAX_TOKENS), "42") == 1.0


@pytest.mark.parametrize(
    "stop", [StopReason.TOOL_FAILURE, StopReason.ENGINE_FAILURE, StopReason.CANCELLED, None]
)
def test_not_scored(reward: RewardFunction, said, stop: StopReason | None) -> None:
    assert reward(said(r"\boxed{42}", stop), "42") is None


def test_only_what_the_model_said_counts(reward: RewardFunction, said, tokenizers) -> None:
    t = said("```py\nprint('\\\\boxed{42}')\n```")
    t.tool_calls.append(ToolCall("", 1, len(t)))
    ids = tuple(tokenizers.bytes.encode(r"\boxed{42}").ids)
    t.append(Segment(TokenSource.TOOL, ids))
    assert reward(t, "42") == 0.0


def test_a_missing_reference_is_an_error(reward: RewardFunction, said) -> None:
    with pytest.raises(RewardError, match="reference is ' ', expected the answer"):
        reward(said("x"), " ")
