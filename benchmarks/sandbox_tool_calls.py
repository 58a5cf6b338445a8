"""The nine typical kinds of tool calls in the mixed workload, as language models write them.

Each function draws its inputs and gives (code, expected stdout, last line of stderr if it fails).
The expected text is computed here by other means than the snippet's wherever there are other means.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

__all__ = ["TYPICAL"]

Call = tuple[str, str, str]


def _arithmetic(rng: random.Random) -> Call:
    base, exponent, modulus = rng.randint(2, 99), rng.randint(50, 400), rng.randint(1000, 9999)
    n = rng.randint(200, 2000)
    code = f"""# Last digits and the digit sum of a big power
value = {base} ** {exponent}
print("remainder:", value % {modulus})
print("digit sum:", sum(int(d) for d in str(value)))

total = 0
for k in range(1, {n} + 1):
    if k % 3 == 0 or k % 5 == 0:
        total += k
print(f"total = {{total}}")
"""
    digits = sum(map(int, str(base**exponent)))
    total = (
        sum(s * (n // s) * (n // s + 1) // 2 for s in (3, 5)) - 15 * (n // 15) * (n // 15 + 1) // 2
    )
    remainder = pow(base, exponent, modulus)
    return code, f"remainder: {remainder}\ndigit sum: {digits}\ntotal = {total}\n", ""


def _strings(rng: random.Random) -> Call:
    words = [
        "".join(rng.choices("abcdehilmnorstuv", k=rng.randint(3, 9)))
        for _ in range(rng.randint(8, 16))
    ]
    shift = rng.randint(1, 25)
    code = f"""import re
from collections import Counter

text = {" ".join(words)!r}
counts = Counter(c for c in text if c.isalpha())
print(max(counts.values()), len(counts))
print(sorted(re.findall(r"\\b\\w*[aeiou]{{2}}\\w*\\b", text)))
shifted = "".join(chr((ord(c) - 97 + {shift}) % 26 + 97) if c != " " else c for c in text)
print(shifted[::-1].title())
"""
    counts = Counter("".join(words))
    pairs = ["".join(pair) for pair in itertools.product("aeiou", repeat=2)]
    doubled = sorted(word for word in words if any(pair in word for pair in pairs))
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    table = str.maketrans(alphabet, alphabet[shift:] + alphabet[:shift])
    turned = " ".join(word.translate(table)[::-1].capitalize() for word in reversed(words))
    return code, f"{max(counts.values())} {len(counts)}\n{doubled}\n{turned}\n", ""


def _fractions(rng: random.Random) -> Call:
    n = rng.randint(15, 60)
    p, q = rng.randint(100, 999), rng.randint(100, 999)
    code = f"""from fractions import Fraction
from math import gcd

s = Fraction(0)
for k in range(1, {n} + 1):
    s += Fraction(1, k * (k + 1))
print("sum =", s)

a, b = {p}, {q}
terms = []
while b:
    terms.append(a // b)
    a, b = b, a % b
print(terms, gcd({p}, {q}))
print(Fraction({p}, {q}) + Fraction({q}, {p}))
"""
    terms, a, b = [], p, q
    while b:
        whole, rest = divmod(a, b)
        terms.append(whole)
        a, b = b, rest
    both = Fraction(p * p + q * q, p * q)
    return code, f"sum = {Fraction(n, n + 1)}\n{terms} {math.gcd(p, q)}\n{both}\n", ""


def _itertools(rng: random.Random) -> Call:
    dice, target = rng.randint(3, 5), rng.randint(6, 18)
    n, k = rng.randint(9, 13), rng.randint(3, 5)
    code = f"""from itertools import combinations, product

count = 0
for roll in product(range(1, 7), repeat={dice}):
    if sum(roll) == {target}:
        count += 1
print("ways:", count)

def no_two_adjacent(c):
    return all(y - x > 1 for x, y in zip(c, c[1:]))

good = [c for c in combinations(range({n}), {k}) if no_two_adjacent(c)]
print(len(good), good[0], good[-1])
"""
    ways = sum(
        (-1) ** j * math.comb(dice, j) * math.comb(target - 6 * j - 1, dice - 1)
        for j in range(dice + 1)
        if target - 6 * j >= 1
    )
    first = tuple(range(0, 2 * k, 2))
    last = tuple(n - 1 - 2 * i for i in reversed(range(k)))
    return code, f"ways: {ways}\n{math.comb(n - k + 1, k)} {first} {last}\n", ""


def _classes(rng: random.Random) -> Call:
    coins = sorted({1, *rng.sample(range(2, 30), 3)})
    amount = rng.randint(60, 240)
    steps = [rng.randint(-50, 90) for _ in range(12)]
    code = f"""from dataclasses import dataclass, field
from functools import lru_cache

@dataclass
class Account:
    owner: str
    balance: int = 0
    history: list = field(default_factory=list)

    def move(self, amount):
        if self.balance + amount < 0:
            self.history.append("refused")
            return
        self.balance += amount
        self.history.append(amount)

account = Account("Ada")
for amount in {steps}:
    account.move(amount)
print(account.balance, account.history.count("refused"))

class Solver:
    def __init__(self, coins):
        self.coins = coins

    @lru_cache(maxsize=None)
    def fewest(self, amount):
        if amount == 0:
            return 0
        return 1 + min(self.fewest(amount - c) for c in self.coins if c <= amount)

print(Solver({coins}).fewest({amount}))
"""
    balance = refused = 0
    for step in steps:
        if balance + step < 0:
            refused += 1
        else:
            balance += step
    reached, coins_used = {0}, 0
    while amount not in reached:
        reached = {sum_ + coin for sum_ in reached for coin in coins if sum_ + coin <= amount}
        coins_used += 1
    return code, f"{balance} {refused}\n{coins_used}\n", ""


def _numpy(rng: random.Random) -> Call:
    x = [rng.randint(-9, 9) for _ in range(3)]
    a = [[rng.randint(-5, 5) + (20 if i == j else 0) for j in range(3)] for i in range(3)]
    b = [sum(p * q for p, q in zip(row, x, strict=True)) for row in a]
    n, step = rng.randint(20, 300), rng.randint(2, 9)
    code = f"""import numpy as np

A = np.array({a}, dtype=float)
b = np.array({b}, dtype=float)
x = np.linalg.solve(A, b)
print(np.round(x).astype(int).tolist(), bool(np.allclose(A @ x, b)))

values = np.arange(1, {n} + 1)
picked = values[values % {step} == 0]
print(int(picked.sum()), int(np.cumsum(values)[-1]), float(values.mean()))
"""
    picked = step * (n // step) * (n // step + 1) // 2
    return code, f"{x} True\n{picked} {n * (n + 1) // 2} {(n + 1) / 2}\n", ""


def _sympy_algebra(rng: random.Random) -> Call:
    x, y = rng.randint(-30, 30), rng.randint(-30, 30)
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(10, 19)
    root = rng.randint(2, 40)
    code = f"""from sympy import symbols, Eq, solve, expand

x, y = symbols('x y')
solution = solve([Eq({a}*x + {b}*y, {a * x + b * y}), Eq({c}*x - y, {c * x - y})], [x, y])
print(solution[x], solution[y])
print(expand((x + {root})**2 - (x - {root})**2))
print(sorted(solve(x**2 - {2 * root}*x + {root * root - 4}, x)))
"""
    return code, f"{x} {y}\n{4 * root}*x\n{[root - 2, root + 2]}\n", ""


def _sympy_calculus(rng: random.Random) -> Call:
    n, k, m = rng.randint(3, 9), rng.randint(2, 30), rng.randint(2, 30)
    code = f"""import sympy as sp

x = sp.Symbol('x')
f = x**{n} - {k}*x
print(sp.diff(f, x))
print(sp.integrate(f, (x, 0, {m})))
print(sp.limit(sp.sin({k}*x)/({m}*x), x, 0))
"""
    area = Fraction(m ** (n + 1), n + 1) - Fraction(k * m * m, 2)
    return code, f"{n}*x**{n - 1} - {k}\n{area}\n{Fraction(k, m)}\n", ""


def _mistakes(rng: random.Random) -> Call:
    n, k = rng.randint(3, 30), rng.randint(3, 99_999)
    name = "".join(rng.choices("bcdfgh", k=5))
    choices: list[Call] = [
        (
            f"values = list(range({n}))\nfor v in reversed(values):\n    print({k} // v)\n",
            "".join(f"{k // v}\n" for v in range(n - 1, 0, -1)),
            "ZeroDivisionError: integer division or modulo by zero",
        ),
        (
            f"total = {n}\nprint(total)\nprint({name}_count + total)\n",
            f"{n}\n",
            f"NameError: name '{name}_count' is not defined",
        ),
        (
            f"def f(x):\n    return x + {k}\n\nprint(f(1)\nprint(f(2))\n",
            "",
            "SyntaxError: '(' was never closed",
        ),
        (
            f"d = [i * i + {k} for i in range({n})]\nprint({n})\nassert d[-1] == {k}, d[{n - 1}]\n",
            f"{n}\n",
            f"AssertionError: {(n - 1) ** 2 + k}",
        ),
        (
            f"items = [1, 2, 3]\nprint(sum(items))\nprint(items[{k}])\n",
            "6\n",
            "IndexError: list index out of range",
        ),
    ]
    return rng.choice(choices)


TYPICAL: tuple[Callable[[random.Random], Call], ...] = (
    _arithmetic,
    _strings,
    _fractions,
    _itertools,
    _classes,
    _numpy,
    _sympy_algebra,
    _sympy_calculus,
    _mistakes,
)
