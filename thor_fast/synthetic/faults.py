"""Slips that make a working program fail, of the kinds real policies make.

Each takes a program and returns a broken one, or ``None`` where the slip cannot be made in it. What
the broken program says when it fails is found by running it, see :mod:`.execution`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from thor_fast.synthetic.execution import run_trusted
from thor_fast.types import Status

__all__ = ["FAULTS", "break_program"]

_PRINT = re.compile(r"^print\((.+)\)$", re.MULTILINE)


def _missing_import(code: str) -> str | None:
    head, _, rest = code.partition("\n")
    return rest if "import" in head else None


def _undefined_name(code: str) -> str | None:
    match = _PRINT.search(code)
    if match is None:
        return None
    if match[1].isidentifier():
        return f"{code[: match.start()]}print(result)"
    return f"{code[: match.start()]}x={match[1]}\nprint(result)"


def _unclosed_parenthesis(code: str) -> str | None:
    return code[:-1] if code.endswith(")") else None


def _missing_colon(code: str) -> str | None:
    return code.replace(":\n", "\n", 1) if ":\n" in code else None


def _text_plus_number(code: str) -> str | None:
    match = _PRINT.search(code)
    return None if match is None else f'{code[: match.start()]}print("r="+{match[1]})'


def _zero_divisor(code: str) -> str | None:
    broken, n = re.subn(r"(//|%)(\d+|d\b)", r"\g<1>0", code, count=1)
    return broken if n else None


def _wrong_attribute(code: str) -> str | None:
    broken, n = re.subn(r"math\.(gcd|lcm)", lambda m: f"math.{m[1].upper()}", code, count=1)
    return broken if n else None


FAULTS: tuple[Callable[[str], str | None], ...] = (
    _missing_import,
    _undefined_name,
    _unclosed_parenthesis,
    _missing_colon,
    _text_plus_number,
    _zero_divisor,
    _wrong_attribute,
)


def break_program(rng: Random, code: str) -> str:
    """``code`` with one slip that makes it fail, drawn among those that apply.

    Every program that ends in ``print(...)`` can lose its last parenthesis, so there is always one.
    """
    for fault in rng.sample(FAULTS, len(FAULTS)):
        broken = fault(code)
        if broken is not None and run_trusted(broken).status is Status.ERROR:
            return broken
    raise ValueError(f"no fault makes this program fail, expected one that prints: {code!r}")
