"""What the sandbox benchmark runs, and how an answer is judged.

Every snippet knows what it must print: the expected text is worked out here, without running the
snippet. Inputs are drawn anew for each snippet, so that no cache of an earlier one answers; all
backends get the same ones. Nobody who warms interpreters up chose them, and the ``sympy-unwarmed``
workload is a family of functions that no warm-up touches (a test holds that).
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sandbox_tool_calls import TYPICAL

from thor_fast.types import ExecutionResult, Status

__all__ = ["MIXED_SET", "UNWARMED_MODULE", "WORKLOADS", "Snippet", "Verdict", "Workload", "judge"]

UNWARMED_MODULE = "sympy.physics"
MIXED_SET = 48
"""Snippets in one set of the mixed workload, each of its kinds among them."""
_MIB = 1 << 20


class Ending(enum.Enum):
    """How a snippet is meant to end."""

    OK = "ok"
    ERROR = "error"
    """An uncaught exception; its last line is known."""
    TIMEOUT = "timeout"
    FLOOD = "flood"
    """More output than most keep: whole, or cut and said so."""
    MEMORY = "memory"
    """An allocation beyond the limit."""


class Verdict(enum.Enum):
    """What an answer was worth."""

    RIGHT = "right"
    FALSE_TIMEOUT = "false timeout"
    UNBOUNDED = "limit not enforced"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Snippet:
    """Code and what it must do. ``last_line``: of stderr, where the ending is an error."""

    code: str
    stdout: str = ""
    ending: Ending = Ending.OK
    last_line: str = ""
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of load at one concurrency, the number of requests in flight.

    ``batch(n)`` gives the n-th batch of snippets, always of the same size. ``goal``: executions per
    second relative to a plain subprocess that our sandbox is meant to reach; 0: none was set.
    """

    name: str
    concurrency: int
    goal: float
    batch: Callable[[int], Sequence[Snippet]]

    @property
    def key(self) -> str:
        """As in ``mixed c=8``."""
        return f"{self.name} c={self.concurrency}"


def judge(snippet: Snippet, result: ExecutionResult) -> Verdict:
    """Compare a result with what the snippet must do."""
    status = result.status
    if snippet.ending is Ending.MEMORY:
        if status in (Status.OK, Status.TIMEOUT):
            return Verdict.UNBOUNDED
        contained = status is Status.MEMORY or _last_line(result.stderr) == "MemoryError"
        return Verdict.RIGHT if contained else Verdict.WRONG
    if snippet.ending is Ending.TIMEOUT:
        return Verdict.RIGHT if status is Status.TIMEOUT else Verdict.WRONG
    if status is Status.TIMEOUT:
        return Verdict.FALSE_TIMEOUT
    if snippet.ending is Ending.FLOOD:
        head = snippet.stdout[: _MIB // 4]
        cut = status is Status.OUTPUT and result.truncated and result.stdout.startswith(head)
        right = cut or (status is Status.OK and result.stdout == snippet.stdout)
    elif snippet.ending is Ending.ERROR:
        right = status is Status.ERROR and result.stdout == snippet.stdout
        right = right and _last_line(result.stderr) == snippet.last_line
    else:
        right = status is Status.OK and result.stdout == snippet.stdout
    return Verdict.RIGHT if right else Verdict.WRONG


def _last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def _trivial(size: int) -> Callable[[int], Sequence[Snippet]]:
    return lambda _: [Snippet("print(1+1)", "2\n")] * size


def _sympy(size: int) -> Callable[[int], Sequence[Snippet]]:
    kinds = (_solve, _factor, _integrate)
    return lambda batch: [
        kinds[i % len(kinds)](random.Random(f"sympy {batch} {i}")) for i in range(size)
    ]


def _solve(rng: random.Random) -> Snippet:
    p, q, r = roots = sorted(rng.sample(range(-40, 41), 3))
    code = f"""from sympy import symbols, solve

x = symbols('x')
roots = solve(x**3 - ({p + q + r})*x**2 + ({p * q + q * r + p * r})*x - ({p * q * r}), x)
print(sorted(roots))
"""
    return Snippet(code, f"{roots}\n")


def _factor(rng: random.Random) -> Snippet:
    a, b = rng.randint(2, 999), rng.randint(2, 999)
    code = f"""from sympy import *

x = Symbol('x')
print(factor(x**3 + {a}*x**2 + {b}*x + {a * b}))
"""
    return Snippet(code, f"(x + {a})*(x**2 + {b})\n")


def _integrate(rng: random.Random) -> Snippet:
    m = rng.randint(2, 999)
    code = f"""import sympy as sp

x = sp.symbols('x', real=True)
area = sp.integrate(x*sp.exp({m}*x), (x, 0, 1))
print(sp.simplify(area - sp.Rational({m - 1}, {m * m})*sp.E**{m}))
"""
    return Snippet(code, f"1/{m * m}\n")


def _calculus_batches(size: int) -> Callable[[int], Sequence[Snippet]]:
    return lambda batch: [_calculus(random.Random(f"calculus {batch} {i}")) for i in range(size)]


def _calculus(rng: random.Random) -> Snippet:
    """Integrals and a simplification that sympy itself takes long for: the sandbox hardly shows."""
    k, m = rng.randint(2, 90), rng.randint(2, 90)
    code = f"""from sympy import *

x = symbols('x')
print(integrate(x*cos({k}*x), (x, 0, pi/{k})), integrate(x**2*exp(-{m}*x), (x, 0, oo)))
print(simplify((x**2 - {k * k})/(x - {k}) + {m}*sin(x)**2 + {m}*cos(x)**2))
"""
    integrals = f"{Fraction(-2, k * k)} {Fraction(2, m**3)}"
    return Snippet(code, f"{integrals}\nx + {k + m}\n")


def _unwarmed(size: int) -> Callable[[int], Sequence[Snippet]]:
    return lambda batch: [_units(random.Random(f"unwarmed {batch} {i}")) for i in range(size)]


def _units(rng: random.Random) -> Snippet:
    """Word problems with units of measurement, which ``import sympy`` does not import."""
    speed, minutes = rng.randint(20, 300), rng.randint(5, 90)
    density, mass, pull = rng.randint(2, 30), rng.randint(2, 900), rng.randint(2, 99)
    code = f"""from sympy.physics.units import (
    centimeter, convert_to, gram, hour, kilogram, kilometer, meter, minute, newton, second)

speed = {speed} * kilometer / hour
print(convert_to(speed, [meter, second]))
print(convert_to(speed * {minutes} * minute, meter))
print(convert_to({density} * gram / centimeter**3, [kilogram, meter]))
print(convert_to({mass} * kilogram * {pull} * meter / second**2, newton))
"""
    metres = Fraction(speed * 5, 18)
    under = "second" if metres.denominator == 1 else f"({metres.denominator}*second)"
    over = "meter" if metres.numerator == 1 else f"{metres.numerator}*meter"
    way = metres * 60 * minutes
    far = f"{way.numerator}*meter" + (f"/{way.denominator}" if way.denominator > 1 else "")
    rest = f"{density * 1000}*kilogram/meter**3\n{mass * pull}*newton\n"
    return Snippet(code, f"{over}/{under}\n{far}\n{rest}")


_SPINNER = Snippet(
    "n = 1\nwhile True:\n    n = n * 3 % 1000003\n    if n < 0:\n        break\nprint(n)\n",
    ending=Ending.TIMEOUT,
    timeout_s=1.0,
)
_FLOOD_LINE = "%d is not a solution, trying the next candidate now"
_FLOOD = Snippet(
    f"for n in range(180_000):\n    print('{_FLOOD_LINE}' % n)\n",
    "".join(f"{_FLOOD_LINE}\n" % n for n in range(180_000)),  # 10 MB
    Ending.FLOOD,
)
_HOG = Snippet("table = bytearray(2 * 1024**3)\nprint(len(table))\n", ending=Ending.MEMORY)


def _mixed(batch: int) -> Sequence[Snippet]:
    """Four sets: the less there are, the more of the time is the wait for the last endless loop."""
    return [s for part in "abcd" for s in _mixed_set(random.Random(f"mixed {batch} {part}"))]


def _mixed_set(rng: random.Random) -> list[Snippet]:
    """48 snippets of 12 kinds: five each of nine typical ones, one each of three bad ones."""
    snippets = [_SPINNER, _FLOOD, _HOG]
    for kind in TYPICAL:
        for _ in range(5):
            code, stdout, last_line = kind(rng)
            ending = Ending.ERROR if last_line else Ending.OK
            snippets.append(Snippet(code, stdout, ending, last_line))
    rng.shuffle(snippets)
    return snippets


WORKLOADS = (
    Workload("trivial", 1, 6.0, _trivial(50)),
    Workload("trivial", 8, 8.0, _trivial(160)),
    Workload("trivial", 64, 10.0, _trivial(256)),
    Workload("sympy", 1, 12.0, _sympy(3)),
    Workload("sympy", 8, 12.0, _sympy(24)),
    Workload("sympy-slow", 8, 0.0, _calculus_batches(16)),
    Workload("sympy-unwarmed", 1, 0.0, _unwarmed(3)),
    Workload("sympy-unwarmed", 8, 0.0, _unwarmed(16)),
    Workload("mixed", 8, 6.0, _mixed),
)
