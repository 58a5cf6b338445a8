"""Sums of the digits of large numbers."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["digit_sum", "problem", "program"]


def problem(rng: Random) -> Problem:
    """Digit sum of a product of two numbers or of a power."""
    if rng.random() < 0.5:
        a, b = rng.randint(100, 99_999), rng.randint(100, 9_999)
        shown, written, number = f"{a}*{b}", f"{a}*{b}", a * b
    else:
        a, b = rng.randint(11, 9_999), rng.randint(9, 60)
        shown, written, number = f"{a}^{b}", f"{a}**{b}", a**b
    value = str(digit_sum(number))
    question = rng.choice(
        (f"Find the digit sum of {shown}.", f"What is the sum of the digits of {shown}?")
    )
    thought = rng.choice(("Add the digits.", "Sum over the digits."))
    return Problem(question, value, (Step(thought, program(rng, written), value),))


def digit_sum(number: int) -> int:
    """Sum of the decimal digits of a non-negative number."""
    return sum(map(int, str(number)))


def program(rng: Random, expression: str) -> str:
    """A program that prints the digit sum of ``expression``."""
    return rng.choice(
        (
            f"print(sum(map(int,str({expression}))))",
            f"s=str({expression})\nprint(sum(int(c) for c in s))",
            f"n={expression}\nprint(sum(map(int,str(n))))",
        )
    )
