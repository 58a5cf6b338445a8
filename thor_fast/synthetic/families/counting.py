"""How many integers of a range satisfy a condition."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """Divisible by one number and not by another, a fixed remainder, or a fixed digit sum."""
    low = rng.randint(10, 999)
    high = low + rng.randint(500, 8_999)
    form = rng.randrange(3)
    if form == 0:
        p, q = rng.randint(3, 19), rng.randint(3, 19)
        what = f"are divisible by {p} but not by {q}"
        condition = f"n%{p}==0 and n%{q}>0"
        value = sum(n % p == 0 and n % q > 0 for n in range(low, high + 1))
    elif form == 1:
        m = rng.randint(3, 99)
        r = rng.randrange(m)
        what, condition = f"leave remainder {r} mod {m}", f"n%{m}=={r}"
        value = sum(n % m == r for n in range(low, high + 1))
    else:
        s = rng.randint(5, 24)
        what, condition = f"have digit sum {s}", f"sum(map(int,str(n)))=={s}"
        value = sum(sum(map(int, str(n))) == s for n in range(low, high + 1))
    question = rng.choice(
        (
            f"How many integers from {low} to {high} {what}?",
            f"Count n from {low} to {high} that {what}.",
        )
    )
    code = _program(rng, low, high, condition)
    thought = rng.choice(("Count them.", "Loop and count."))
    return Problem(question, str(value), (Step(thought, code, str(value)),))


def _program(rng: Random, low: int, high: int, condition: str) -> str:
    # high+1 is left to Python: adding one in one's head is a mistake this family is not about.
    if rng.random() < 0.5:
        return f"print(sum({condition} for n in range({low},{high}+1)))"
    return f"c=0\nfor n in range({low},{high}+1):\n    if {condition}:\n        c+=1\nprint(c)"
