"""What counts as the same answer: a table, and what must hold for any text."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.errors import ConfigError, RewardError
from thor_fast.rewards import MathAnswerReward, MathVerifier, answers_match
from thor_fast.rewards.exact import decide
from thor_fast.rollout import Renderer
from thor_fast.types import Segment, StopReason, TokenSource, Trajectory

# answer, reference; whether algebra is needed.
EQUAL_WITHOUT_ALGEBRA = [
    ("042.0", "42"),
    ("2,023", "2023"),
    ("0.333333", "1/3"),
    ("1/3", "0.3333333"),
    ("0.666667", r"\frac{2}{3}"),
    ("10^{10^{10}}", "10^{10^{10}}"),
    ("(A)", "A"),
    (r"\text{(A)}", "A"),
    ("B.", r"\textbf{(B)}"),
    (r"\mathrm{C}", "C"),
    (r"\text{Evelyn}", "Evelyn"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\text{no solution}", r"\text{No solution.}"),
    ("Monday", r"\textbf{Monday}"),
    ("on", r"\text{on}"),
]
DIFFERENT_WITHOUT_ALGEBRA = [
    ("0.333", "1/3"),
    ("0.666666", r"\frac{2}{3}"),
    ("0.0000001", "0"),
    ("0.5000001", "1/2"),
    ("333.333", "1000/3"),
    ("A", "B"),
    ("(B)", "A"),
    ("x", "X"),
    ("seat", "east"),
    ("5", r"\text{east}"),
    ("no", r"\text{on}"),
    (r"\text{west}", r"\text{east}"),
    ("+".join(["x"] * 600), "600x"),
]
EQUAL = [
    # numbers
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("1.414214", r"\sqrt{2}"),
    (r"\sqrt{2}", "1.41421356"),
    ("6.283185", r"2\pi"),
    ("2.718282", "e"),
    (r"3\frac{1}{2}", "3.5"),
    (r"\sqrt[3]{8}", "2"),
    ("2^{10}", "1024"),
    (r"3\times 10^5", "300000"),
    (r"3 \cdot 10^{-2}", "0.03"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"\ln 8", r"3\ln 2"),
    ("2+3i", "3i+2"),
    (r"\infty", r"+\infty"),
    # units, percent, currency
    ("50\\%", "0.5"),
    ("0.5", "50\\%"),
    ("50", "50\\%"),
    ("50%", "50"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    ("5 cm", "5"),
    ("5", r"5\text{ cm}"),
    (r"5\text{ dollars}", r"\$5"),
    # equations
    ("x=5", "5"),
    ("5", "x=5"),
    ("5=x", "x=5"),
    ("y=2x+1", "1+2x"),
    ("2x-y+1=0", "y=2x+1"),
    ("x=1, x=2", "1,2"),
    (r"x=1\text{ or }x=2", r"\{1,2\}"),
    # tuples, sets, lists
    (r"\left(\frac{1}{2}, 3\right)", "(0.5, 3)"),
    ("1,2", "(1,2)"),
    ("2,1", "1,2"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("1,2", r"\{2,1\}"),
    (r"1 \text{ and } 2", "1,2"),
    (r"\pm 2", "-2, 2"),
    (r"\emptyset", r"\{\}"),
    # intervals and inequalities
    (r"[0, \frac{1}{2})", "[0,0.5)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, +\infty)"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    ("x<2", r"(-\infty,2)"),
    (r"(-\infty,2)", "x<2"),
    (r"1\le x\le 2", "[1,2]"),
    ("[1,2]", r"1 \leq x \leq 2"),
    (r"x\in[1,2]", "[1,2]"),
    ("x > 3", "3 < x"),
    # expressions, also as Python prints them
    ("(x+1)^2", "x^2+2x+1"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\frac{x+2}{2}", r"1+\frac{x}{2}"),
    ("0.5x", r"\frac{x}{2}"),
    ("|x|", r"\sqrt{x^2}"),
    (r"\sin^2 x + \cos^2 x", "1"),
    ("e^{x}", r"\exp(x)"),
    ("x**10 + 1", "1+x^{10}"),
    ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}"),
    ("2*pi", r"2\pi"),
    ("sin(x)", r"\sin x"),
    (r"\operatorname{ln} 2", r"\ln 2"),
    # matrices
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\begin{pmatrix}1&0.5\end{pmatrix}", r"\begin{pmatrix}1&\frac12\end{pmatrix}"),
    # math-verify is lenient here, and docs/rewards.md says so
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"\{1,2\}", "(1,2)"),
    ("(2,1)", r"\{1,2\}"),
    ("X+1", "x+1"),
    ("2x+1=5", "5"),
]
DIFFERENT = [
    ("1.414", r"\sqrt{2}"),
    ("6.28", r"2\pi"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("50\\%", "500"),
    ("2-3i", "2+3i"),
    (r"-\infty", r"\infty"),
    ("y=5", "x=5"),
    ("x=6", "5"),
    ("5", "2x+1=5"),
    ("y=2x+1", "y=2x-1"),
    ("(1,2)", "(2,1)"),
    ("(3,2,1)", "(1,2,3)"),
    ("3,2,1", "(1,2,3)"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    ("(1,2)", "[1,2]"),
    ("[1,2)", "(1,2]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"),
    (r"x\le 2", r"(-\infty,2)"),
    ("x > 3", "x < 3"),
    ("(x+1)^2", "x^2+1"),
    ("2x", "3x"),
    ("no", "yes"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("7:31", "7:30"),
    ("", "x+1"),
    ("}{", "x+1"),
    # what nobody here understands
    ("1e3", "1000"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    ("five", "5"),
    ("i", r"\sqrt{-1}"),
    ("11_2", "3"),
]


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(workers=1, timeout_s=300) as verifier:
        yield verifier


@pytest.mark.parametrize(("answer", "reference"), EQUAL_WITHOUT_ALGEBRA)
def test_equal_without_algebra(answer: str, reference: str) -> None:
    assert decide(answer, reference) is True


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT_WITHOUT_ALGEBRA)
def test_different_without_algebra(answer: str, reference: str) -> None:
    assert decide(answer, reference) is False


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal_by_algebra(verifier: MathVerifier, answer: str, reference: str) -> None:
    assert decide(answer, reference) is None
    assert verifier.match(answer, reference) is True


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_by_algebra(verifier: MathVerifier, answer: str, reference: str) -> None:
    assert decide(answer, reference) is None
    assert verifier.match(answer, reference) is False


@pytest.mark.parametrize("text", sorted({reference for _, reference in EQUAL}))
def test_what_parses_equals_itself_by_algebra(verifier: MathVerifier, text: str) -> None:
    assert verifier._by_algebra(text, text) is True


@given(st.text())
def test_any_text_equals_itself_exactly(text: str) -> None:
    assert decide(text, text) is True
    assert answers_match(text, text)


_ALPHABET = r"0123456789.,/\{}()[]%xA +-=frac\text"


@given(st.text(_ALPHABET), st.text(_ALPHABET))
def test_what_is_exactly_equal_stays_equal(answer: str, reference: str) -> None:
    assert decide(answer, reference) in (True, False, None)
    if answers_match(answer, reference):
        assert decide(answer, reference) is True


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_six_decimals_stand_only_for_a_fraction_that_has_no_end(top: int, bottom: int) -> None:
    value = Fraction(top, bottom)
    millionths = round(value * 10**6)
    left = value.denominator
    for prime in (2, 5):
        while left % prime == 0:
            left //= prime
    decimal = f"{'-' * (millionths < 0)}{abs(millionths) // 10**6}.{abs(millionths) % 10**6:06}"
    assert decide(decimal, f"{top}/{bottom}") is (left > 1 or value * 10**6 == millionths)


def test_a_reference_nobody_understands_is_not_scored(verifier: MathVerifier) -> None:
    before = verifier.unscored["reference"]
    assert verifier.match("5", r"\frac{") is None
    assert verifier.unscored["reference"] == before + 1
    assert verifier.match(r"\frac{", r"\frac{") is True


def test_the_reward_is_the_verifiers_verdict(verifier: MathVerifier, tokenizers) -> None:
    def said(text: str) -> Trajectory:
        ids = tuple(tokenizers.bytes.encode(text).ids)
        t = Trajectory((5,), [Segment(TokenSource.MODEL, ids, (-1.0,) * len(ids))])
        t.stop_reason = StopReason.EOS
        return t

    renderer = Renderer(tokenizers.bytes)
    reward = MathAnswerReward(renderer, verifier)
    answer = said(r"\boxed{3} no, \boxed{x+x}")
    assert reward(answer, "2x") == 1.0
    assert reward(answer, "3x") == 0.0
    assert reward(answer, r"\frac{") is None
    assert reward(said("x+x"), "2x") == 0.0
    assert MathAnswerReward(renderer)(answer, "2x") == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers is 0, expected >= 1"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0, expected > 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan, expected > 0"),
    ],
)
def test_settings_out_of_range(settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MathVerifier(**settings)


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed, expected thor_fast\[math\]"):
        MathVerifier()


def test_closed_is_closed() -> None:
    verifier = MathVerifier()
    verifier.close()
    verifier.close()
    with pytest.raises(RewardError, match="the verifier is closed"):
        verifier.match("1", "1")
