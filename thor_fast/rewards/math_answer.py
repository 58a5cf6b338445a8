r"""Is the last ``\boxed{...}`` the right answer? 1.0 or 0.0, by exact comparison.

Numbers are compared as fractions, never as floats: ``0.5``, ``1/2`` and ``\frac{1}{2}`` are equal,
``0.333`` and ``1/3`` are not. Anything else is compared as text without spacing commands.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from thor_fast.errors import RewardError
from thor_fast.types import Trajectory

if TYPE_CHECKING:
    from thor_fast.rollout.renderer import Renderer

__all__ = ["MathAnswerReward", "answers_match", "last_boxed"]

_BOXED = re.compile(r"\\boxed\s*\{")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|quad)(?![A-Za-z])|\s|\$")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac(?:\{([^{}]+)\}|([0-9]))(?:\{([^{}]+)\}|([0-9]))")
# CPython refuses to convert longer ones (sys.set_int_max_str_digits), and no task needs them.
_MAX_DIGITS = 4300


class MathAnswerReward:
    """Keeps :class:`~thor_fast.rewards.base.RewardFunction`.

    Looks only at what the model said itself, see
    :meth:`~thor_fast.rollout.renderer.Renderer.answer`.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def __call__(self, trajectory: Trajectory, reference: str) -> float | None:
        if not reference.strip():
            raise RewardError(f"reference is {reference!r}, expected the answer to compare with")
        stop = trajectory.stop_reason
        if stop is None or stop.is_infrastructure:
            return None
        answer = last_boxed(self._renderer.answer(trajectory))
        return float(answer is not None and answers_match(answer, reference))


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds, braces balanced; ``None`` without one.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for match in reversed(list(_BOXED.finditer(text))):
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() : end]
    return None


def answers_match(answer: str, reference: str) -> bool:
    r"""Equal as numbers if both are numbers, as normalised text otherwise.

    >>> answers_match("1,234.50", "2469/2"), answers_match("x + 1", "x+1"), answers_match("a", "A")
    (True, True, False)
    """
    ours, theirs = _normalise(answer), _normalise(reference)
    numbers = _number(ours), _number(theirs)
    return ours == theirs if None in numbers else numbers[0] == numbers[1]


def _closing_brace(text: str, start: int) -> int | None:
    r"""Where the brace opened just before ``start`` closes; ``\{`` and ``\}`` do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def _normalise(text: str) -> str:
    text = _SPACING.sub("", text).replace("{,}", ",").rstrip(".")
    return re.sub(r"\\[dt]frac", r"\\frac", text).replace("\N{MINUS SIGN}", "-")


def _number(text: str) -> Fraction | None:
    """The exact value of an integer, a decimal, or a fraction of two of these."""
    if len(text) > _MAX_DIGITS:
        return None
    latex = _LATEX_FRACTION.fullmatch(text)
    if latex:
        sign, top, top_digit, bottom, bottom_digit = latex.groups()
        over, under = _decimal(top or top_digit), _decimal(bottom or bottom_digit)
        over = None if over is None else -over if sign == "-" else over
    else:
        head, slash, tail = text.partition("/")
        over, under = _decimal(head), _decimal(tail) if slash else Fraction(1)
    return over / under if over is not None and under else None


def _decimal(text: str) -> Fraction | None:
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return Fraction(text) if _DECIMAL.fullmatch(text) else None
