"""Problems whose answer is an exact computation, each with programs that solve it.

A task is a pure function of ``(family, seed, index)``: no file is read, nothing is downloaded, and
the same triple gives the same problem on every machine. Train and test draw from different seeds;
the held-out families are never trained on.

>>> task = generate("powers", seed=TEST_SEED, index=0)
>>> task == generate("powers", TEST_SEED, 0)
True
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import MappingProxyType

from thor_fast.errors import ConfigError
from thor_fast.synthetic.families import (
    arithmetic,
    chain,
    composed,
    counting,
    digits,
    divisors,
    linear,
    powers,
    residues,
)
from thor_fast.synthetic.problem import Problem, Step, Task

__all__ = [
    "HELD_OUT_FAMILIES",
    "TEST_SEED",
    "TRAINED_FAMILIES",
    "TRAIN_SEED",
    "Problem",
    "Step",
    "Task",
    "generate",
    "task_set",
]

TRAIN_SEED = 1
TEST_SEED = 2

_TRAINED: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": arithmetic.problem,
    "powers": powers.problem,
    "divisors": divisors.problem,
    "digits": digits.problem,
    "linear": linear.problem,
    "counting": counting.problem,
    "chain": chain.problem,
}
_HELD_OUT: dict[str, Callable[[random.Random], Problem]] = {
    "composed": composed.problem,
    "residues": residues.problem,
}
_FAMILIES = MappingProxyType(_TRAINED | _HELD_OUT)

TRAINED_FAMILIES = tuple(_TRAINED)
HELD_OUT_FAMILIES = tuple(_HELD_OUT)


def generate(family: str, seed: int, index: int) -> Task:
    """The ``index``-th task of ``family`` under ``seed``.

    Raises ``ConfigError`` for an unknown family or a negative index.
    """
    if family not in _FAMILIES:
        raise ConfigError(f"family is {family!r}, expected one of {', '.join(_FAMILIES)}")
    if index < 0:
        raise ConfigError(f"index is {index}, expected >= 0")
    # A string seed goes through SHA-512: neighbouring indices get unrelated streams.
    rng = random.Random(f"{family}/{seed}/{index}")  # noqa: S311 - not for secrets
    problem = _FAMILIES[family](rng)
    return Task(
        family=family,
        seed=seed,
        index=index,
        question=problem.question,
        answer=problem.answer,
        steps=problem.steps,
    )


def task_set(n: int, seed: int, families: Sequence[str] = TRAINED_FAMILIES) -> list[Task]:
    """``n`` tasks that go round ``families`` in turn, so any prefix is balanced to within one."""
    if n < 0:
        raise ConfigError(f"n is {n}, expected >= 0")
    if not families:
        raise ConfigError("families is empty, expected at least one family name")
    k = len(families)
    return [generate(families[i % k], seed, i // k) for i in range(n)]
