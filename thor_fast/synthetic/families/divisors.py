"""Greatest common divisors and least common multiples."""

from __future__ import annotations

import math
from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """The gcd or lcm of two numbers with a common factor; half of the lcms go through the gcd."""
    g = rng.randint(6, 199)
    a, b = g * rng.randint(11, 199), g * rng.randint(11, 199)
    name = rng.choice(("gcd", "lcm"))
    value = str(math.gcd(a, b) if name == "gcd" else math.lcm(a, b))
    question = rng.choice((f"Find the {name} of {a} and {b}.", f"What is {name}({a},{b})?"))
    if name == "lcm" and rng.random() < 0.5:
        return Problem(question, value, _through_gcd(rng, a, b))
    return Problem(question, value, (Step(f"Use math.{name}.", call(rng, name, a, b), value),))


def call(rng: Random, name: str, a: int, b: int) -> str:
    """A program that prints ``math.<name>(a, b)``, in one of three ways of writing it."""
    return rng.choice(
        (
            f"import math\nprint(math.{name}({a},{b}))",
            f"from math import {name}\nprint({name}({a},{b}))",
            f"import math\nr=math.{name}({a},{b})\nprint(r)",
        )
    )


def _through_gcd(rng: Random, a: int, b: int) -> tuple[Step, ...]:
    g = math.gcd(a, b)
    return (
        Step("First the gcd.", call(rng, "gcd", a, b), str(g)),
        Step("Now the product over it.", f"print({a}*{b}//{g})", str(math.lcm(a, b))),
    )
