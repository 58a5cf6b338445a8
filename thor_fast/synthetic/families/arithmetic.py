"""Products of numbers too long to multiply in one's head."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """``a*b+c``, ``a*b-c`` or ``a*b-c*d`` with factors of 3 to 5 digits."""
    a, b = rng.randint(100, 99_999), rng.randint(100, 9_999)
    form = rng.randrange(3)
    if form == 0:
        c = rng.randint(100, 99_999)
        expression, value = f"{a}*{b}+{c}", a * b + c
    elif form == 1:
        c = rng.randint(100, 99_999)
        expression, value = f"{a}*{b}-{c}", a * b - c
    else:
        a, c, d = rng.randint(100, 9_999), rng.randint(100, 9_999), rng.randint(100, 999)
        expression, value = f"{a}*{b}-{c}*{d}", a * b - c * d
    question = rng.choice(("Compute {}.", "What is {}?", "Find the value of {}."))
    code = rng.choice((f"print({expression})", f"r={expression}\nprint(r)"))
    thought = rng.choice(("Compute it.", "Let me compute."))
    return Problem(question.format(expression), str(value), (Step(thought, code, str(value)),))
