"""Two equations in two unknowns, solved by Cramer's rule."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """``ax+by=p, cx+dy=q`` with an integer solution; half go by way of the determinant."""
    x, y = rng.randint(-99, 99), rng.randint(-99, 99)
    a, b, c, d = (_coefficient(rng) for _ in range(4))
    while a * d == b * c:
        d = _coefficient(rng)
    p, q = a * x + b * y, c * x + d * y
    unknown = rng.choice("xy")
    value = str(x if unknown == "x" else y)
    system = f"{a}x{b:+d}y={p}, {c}x{d:+d}y={q}"
    question = rng.choice((f"Solve {system}. Find {unknown}.", f"If {system}, what is {unknown}?"))
    top = f"{p}*{d}-{b}*{q}" if unknown == "x" else f"{a}*{q}-{p}*{c}"
    bottom = f"{a}*{d}-{b}*{c}"
    if rng.random() < 0.5:
        code = f"d={bottom}\nprint(({top})//d)"
        return Problem(question, value, (Step("Cramer's rule.", code, value),))
    determinant = a * d - b * c
    steps = (
        Step("First the determinant.", f"print({bottom})", str(determinant)),
        Step("Now divide by it.", f"print(({top})//{determinant})", value),
    )
    return Problem(question, value, steps)


def _coefficient(rng: Random) -> int:
    size = rng.randint(2, 29)
    return size if rng.random() < 0.7 else -size
