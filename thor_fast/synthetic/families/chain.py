"""Two computations in a row: the second uses what the first printed.

Three first parts times three second parts make nine pairs. Six are trained on here; the other
three, one of each row and column, are the held-out family :mod:`.composed`.
"""

from __future__ import annotations

import math
from random import Random

from thor_fast.synthetic.families.digits import digit_sum, program
from thor_fast.synthetic.families.divisors import call
from thor_fast.synthetic.problem import Problem, Step

__all__ = ["HELD_OUT_PAIRS", "TRAINED_PAIRS", "problem", "two_steps"]

TRAINED_PAIRS = (
    ("gcd", "product"),
    ("gcd", "power"),
    ("power", "product"),
    ("power", "digits"),
    ("lcm", "power"),
    ("lcm", "digits"),
)
HELD_OUT_PAIRS = (("gcd", "digits"), ("power", "power"), ("lcm", "product"))


def problem(rng: Random) -> Problem:
    """One of the trained pairs."""
    return two_steps(rng, *rng.choice(TRAINED_PAIRS))


def two_steps(rng: Random, first: str, second: str) -> Problem:
    """Find ``k``, then something of ``k``.

    Each block runs in a fresh process, so the model has to copy ``k`` from the observation.
    """
    shown, code, k = _first(rng, first)
    then, then_code, value = _second(rng, second, k)
    question = rng.choice((f"Let k={shown}. Find {then}.", f"If k={shown}, what is {then}?"))
    steps = (
        Step("First find k.", code, str(k)),
        Step(f"Now k={k}.", then_code, str(value)),
    )
    return Problem(question, str(value), steps)


def _first(rng: Random, kind: str) -> tuple[str, str, int]:
    """How ``k`` is shown in the question, a program that prints it, and its value."""
    if kind == "power":
        b, e, m = rng.randint(11, 999), rng.randint(11, 999), rng.randint(101, 99_999)
        return f"{b}^{e} mod {m}", f"print(pow({b},{e},{m}))", pow(b, e, m)
    g = rng.randint(11, 299)
    a, b = g * rng.randint(3, 49), g * rng.randint(3, 49)
    k = math.gcd(a, b) if kind == "gcd" else math.lcm(a, b)
    return f"{kind}({a},{b})", call(rng, kind, a, b), k


def _second(rng: Random, kind: str, k: int) -> tuple[str, str, int]:
    if kind == "product":
        c, d = rng.randint(100, 9_999), rng.randint(100, 9_999)
        return f"k*{c}+{d}", f"print({k}*{c}+{d})", k * c + d
    if kind == "power":
        e, m = rng.randint(11, 99), rng.randint(101, 9_999)
        return f"k^{e} mod {m}", f"print(pow({k},{e},{m}))", pow(k, e, m)
    c = rng.randint(11, 999)
    return f"the digit sum of k*{c}", program(rng, f"{k}*{c}"), digit_sum(k * c)
