"""Held out, far: a search the policy has never been shown anything like."""

from __future__ import annotations

from random import Random

from thor_fast.synthetic.problem import Problem, Step

__all__ = ["problem"]


def problem(rng: Random) -> Problem:
    """The smallest integer above a bound with given remainders modulo two primes."""
    low = rng.randint(100, 9_999)
    p, q = rng.sample((7, 11, 13, 17, 19, 23, 29, 31), 2)
    r, s = rng.randrange(p), rng.randrange(q)
    n = low + 1
    while n % p != r or n % q != s:
        n += 1
    question = f"Find the smallest n above {low} with n mod {p}={r} and n mod {q}={s}."
    code = f"n={low}+1\nwhile n%{p}!={r} or n%{q}!={s}:\n    n+=1\nprint(n)"
    return Problem(question, str(n), (Step("Search for it.", code, str(n)),))
