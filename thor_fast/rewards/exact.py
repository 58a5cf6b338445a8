r"""Comparison of two answers as texts and as exact numbers: no algebra, no process, no float.

Numbers are compared as fractions: ``0.5``, ``1/2`` and ``\frac{1}{2}`` are equal, ``0.333`` and
``1/3`` are not. Anything else is compared as text without spacing commands.
"""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["answers_match", "decide"]

_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|quad)(?![A-Za-z])|\s|\$")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac(?:\{([^{}]+)\}|([0-9]))(?:\{([^{}]+)\}|([0-9]))")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?:?")
# CPython refuses to convert longer ones (sys.set_int_max_str_digits), and no task needs them.
_MAX_DIGITS = 4300
# Half of the last of the six decimals that math-verify compares.
_HALF_STEP = Fraction(1, 2 * 10**6)
# Longer than the answer of any problem; 450 nested parentheses take the parser seconds already.
_MAX_ALGEBRA = 1000
# Three letters may be a product of variables. Four are taken for a word, since a parser would
# call "seat" equal to "east".
_WORD_LETTERS = 4


def answers_match(answer: str, reference: str) -> bool:
    r"""Equal as numbers if both are numbers, as normalised text otherwise. An equivalence relation.

    >>> answers_match("1,234.50", "2469/2"), answers_match("x + 1", "x+1"), answers_match("a", "A")
    (True, True, False)
    """
    ours, theirs = _normalise(answer), _normalise(reference)
    numbers = _number(ours), _number(theirs)
    return ours == theirs if None in numbers else numbers[0] == numbers[1]


def decide(answer: str, reference: str) -> bool | None:
    r"""What can be told without algebra; ``None`` where algebra is needed.

    Beyond :func:`answers_match`: a decimal equals a number without a finite decimal form if they
    agree to six decimals; the letter of a choice may be in parentheses or ``\text``; a reference
    that is a word is compared as text, whatever its case. Texts of more than 1 000 characters are
    equal here or not at all.

    >>> decide("0.333333", "1/3"), decide(r"\textbf{(B)}", "B"), decide("2x", "x+x")
    (True, True, None)
    """
    if answers_match(answer, reference):
        return True
    ours, theirs = _normalise(answer), _normalise(reference)
    value, expected = _number(ours), _number(theirs)
    if value is not None and expected is not None:
        return ("." in ours and _rounds_to(expected, value)) or (
            "." in theirs and _rounds_to(value, expected)
        )
    if max(len(ours), len(theirs)) > _MAX_ALGEBRA:
        return False
    mine, its = (_TEXT.sub(r"\1", text).rstrip(".") for text in (ours, theirs))
    letters = _CHOICE.fullmatch(mine), _CHOICE.fullmatch(its)
    if letters[0] and letters[1]:
        return letters[0][1] == letters[1][1]
    if its.isalpha() and len(its) >= (_WORD_LETTERS if its == theirs else 2):
        return mine.casefold() == its.casefold()
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


def _rounds_to(number: Fraction, decimal: Fraction) -> bool:
    """Whether a number that no decimal can express is this one to six places."""
    # With no prime factors but 2 and 5, the denominator divides a power of ten.
    finite = pow(10, number.denominator.bit_length(), number.denominator) == 0
    return not finite and abs(number - decimal) <= _HALF_STEP
