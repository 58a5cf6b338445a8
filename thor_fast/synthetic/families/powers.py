"""Powers modulo a number."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """``b^e mod m`` with a base and exponent of 2 to 3 digits and a modulus of 3 to 5."""
    b, e, m = rng.randint(11, 999), rng.randint(11, 999), rng.randint(101, 99_999)
    value = str(pow(b, e, m))
    question = rng.choice(
        (f"Find {b}^{e} mod {m}.", f"What is the remainder when {b}^{e} is divided by {m}?")
    )
    code = rng.choice(
        (f"print(pow({b},{e},{m}))", f"print({b}**{e}%{m})", f"r=pow({b},{e},{m})\nprint(r)")
    )
    thought = rng.choice(("A modular power.", "Use pow."))
    return Problem(question, value, (Step(thought, code, value),))
