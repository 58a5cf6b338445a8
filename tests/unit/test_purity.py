"""Which snippets may be run once for many: known pure ones are, and nothing that could differ."""

from __future__ import annotations

import builtins
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.rollout import purity
from thor_fast.rollout.purity import is_pure

PURE = [
    "print(6 * 7)",
    "n = 2764 ** 16\nprint(sum(map(int, str(n))))",
    "print(sum(sum(map(int, str(n))) == 18 for n in range(722, 5353)))",
    "import math\nprint(math.gcd(585, 2700), math.pi)",
    "from math import comb, factorial as f\nprint(comb(5, 2) + f(3))",
    "from math import *\nprint(sqrt(2))",
    "from fractions import Fraction\nx = Fraction(1, 3)\nprint(x.numerator, x + 1)",
    "from itertools import permutations\nfor p in permutations(range(3)):\n    print(p)",
    "import itertools\nprint(list(itertools.combinations('abc', 2)))",
    "from functools import lru_cache\n@lru_cache(None)\ndef f(n):\n    return n and f(n - 1)\nf(3)",
    "from collections import Counter, defaultdict\nd = defaultdict(int)\nprint(d, Counter('x'))",
    "def is_prime(n):\n    return n > 1 and all(n % i for i in range(2, n))\nprint(is_prime(7))",
    "xs = sorted([3, 1], key=lambda x: -x)\nxs.sort(key=abs)\nprint(*map(str, xs), sep=', ')",
    "from functools import reduce\nimport math\nprint(reduce(math.lcm, range(1, 9)))",
    "a, b = map(int, '1 2'.split())\nprint(f'{a:>4} {b!r}')",
    "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    print(e)",
    "from decimal import Decimal, getcontext\ngetcontext().prec = 30\nprint(Decimal(1) / 3)",
    "def main():\n    print(1)\nif __name__ == '__main__':\n    main()",
    "from sympy import symbols, solve, Eq\nx, y = symbols('x y')\nprint(solve(Eq(x ** 2, 4), x))",
    "from sympy import *\nx = symbols('x')\nprint(f'({diff(sin(x))})', limit(1 / x, x, 0, '+'))",
    "import sympy as sp\nprint(sp.factorint(360))",
    "raise ValueError('no')",
    "",
]

IMPURE = {
    "clock": "import time\nprint(time.time())",
    "clock by datetime": "from datetime import datetime\nprint(datetime.now())",
    "randomness": "import random\nprint(random.random())",
    "numpy's": "import numpy as np\nprint(np.random.rand())",
    "sympy's": "from sympy import randprime\nprint(randprime(1, 99))",
    "sympy's, as a submodule": "from sympy.core.random import random\nprint(random())",
    "sympy's, as an attribute": "from sympy import Matrix\nprint(Matrix.rand(2))",
    "sympy's, by a method": "import sympy\nx = sympy.Interval(0, 1).random_point()",
    "system": "import os\nprint(os.getpid())",
    "relative": "from . import math",
    "part of a module": "import os.path",
    "unknown function of a known module": "import math\nprint(math.sumprod([1], [1]))",
    "module handed on": "import math\nprint(math)",
    "files": "print(open('x').read())",
    "input": "print(input())",
    "eval": "print(eval('1'))",
    "exec": "exec('import time')",
    "import by name": "print(__import__('time').time())",
    "getattr": "import math\nprint(getattr(math, '__loader__'))",
    "builtins": "print(__builtins__)",
    "globals": "print(globals())",
    "class tricks": "print(().__class__.__base__.__subclasses__())",
    "a class": "class A:\n    pass\nprint(A())",
    "id": "print(id(1))",
    "hash": "print(hash('a'))",
    "object": "print(object())",
    "a generator's address": "print(str(i for i in [1]))",
    "a lambda's address": "print(str(lambda: 0)[-5:])",
    "a lambda, kept": "f = lambda: 0\nprint(f)",
    "a function's address": "def f():\n    pass\nprint(*str(f))",
    "a function in a list": "def f():\n    pass\nprint(str([f])[20:])",
    "a function handed on": "def f(): pass\ndef g(h): return str(h)\nprint(g(f))",
    "a function as a key of ours": "def f(): pass\ndef g(key): return str(key)\nprint(g(key=f))",
    "a function as a value": "def f(): pass\nprint(str(dict(key=f)))",
    "a function out of max": "def f(): pass\nprint(str(max(f, f, key=lambda x: 0)))",
    "a function out of reduce": "from functools import reduce\ndef f(): 1\nprint(reduce(f, [], f))",
    "a function returned": "def f():\n    def g(): pass\n    return g\nprint(str(f()))",
    "a function in a format": "def f(): pass\nprint(f'{f}'[20:])",
    "an imported function": "from functools import reduce\nprint(str(reduce))",
    "a module's function": "import statistics\nprint(str(statistics.mean))",
    "a method's address": "print(str([].append))",
    "an iterator's address": "print(str(map(int, [])))",
    "an iterator, kept": "m = zip([1], [2])\nprint(str(m))",
    "an iterator in a list": "print(str([iter([])]))",
    "an iterator of iterators": "print(list(map(iter, [[1]])))",
    "an iterator by another name": "z = zip\nprint(str(z()))",
    "an iterator to our sum": "def sum(x):\n    return str(x)\nprint(sum(map(int, [])))",
    "an iterator to our mean": "def mean(x):\n    return str(x)\nprint(mean(map(int, [])))",
    "an iterator out of next": "print(str(next(iter([]), map(int, []))))",
    "an iterator out of min": "print(str(min(map(int, []), zip(), key=lambda m: 0)))",
    "an iterator out of reduce": "from functools import reduce\nprint(reduce(max, [], zip()))",
    "an iterator out of repeat": "from itertools import repeat\nprint(list(repeat(zip(), 2)))",
    "a decorator called": "from functools import lru_cache\nprint(str(lru_cache(None)))",
    "a cached function": "import functools\ndef f(): 1\nprint(str(functools.cache(f)))",
    "sympy's generator": "from sympy import divisors\nprint(str(divisors(6, generator=True)))",
    "other builtins": "from math import pi as __builtins__\nprint(1)",
    "groups": "from itertools import groupby\nprint([str(g) for _, g in groupby('a')])",
    "itertools, as an attribute": "import itertools\nc = itertools.count\nprint(str(c()))",
    "format by attribute": "print('{0.__class__}'.format(1))",
    "a generator": "def f():\n    yield 1\nprint(str(f()))",
    "with": "with open('x') as f:\n    pass",
    "async": "async def f(): pass\nprint(f())",
    "match": "match 1:\n    case int(real=x):\n        print(x)",
    "list is str": "list = str\nprint(list(map(int, [])))",
    "a parameter called str": "def f(len):\n    return len\nprint(f(1))",
    "import in place of a builtin": "from math import gcd as list\nprint(list(1, 2))",
    "undefined": "print(unknown)",
    "a call in a string to sympy": "from sympy import solve\nsolve(\"__import__('time').time()\")",
    "sympify": "from sympy import sympify\nprint(sympify('1'))",
    "S of a call": "from sympy import S\nprint(S('open(1)'))",
    "a bracket by chr": "from sympy import S\nprint(S('id' + chr(40) + '1' + chr(41)))",
    "a bracket by map": "from sympy import S\nprint(S('id' + ''.join(map(chr, [40, 41]))))",
    "a bracket by str": "from sympy import S\nb = str((1,))\nprint(S('id' + b[0] + b[-1]))",
    "a bracket by an f-string": "from sympy import S\nprint(S(f'id{(1,)}'))",
    "a bracket by a format": "from sympy import S\nprint(S('id%c1%c' % (40, 41)))",
    "a bracket by an error": "from sympy import S\ntry:\n    1()\nexcept TypeError as e:\n    S(e)",
    "a bracket by bytes": "from sympy import S\nprint(S(b'id(1)'))",
    "a bracket within print": "from sympy import S\nprint(f\"{S('id(1)')}\")",
    "does not parse": "print(",
    "NUL": "print('\0')\0",
}


@pytest.mark.parametrize("code", PURE)
def test_pure(code: str) -> None:
    assert is_pure(code)


@pytest.mark.parametrize("name", IMPURE)
def test_impure(name: str) -> None:
    assert not is_pure(IMPURE[name])


@pytest.mark.parametrize("module", sorted(purity._MODULES))
def test_the_lists_are_right_about_what_they_list(module: str) -> None:
    found = importlib.import_module(module)
    for name in purity._MODULES[module] - {"cbrt", "exp2", "pairwise"}:  # of Python 3.10 and 3.11
        thing = getattr(found, name)
        constant = not callable(thing) or isinstance(thing, type)
        if name[0].isupper() or name in purity._VALUES_IMPORTED:
            assert constant or " at 0x" not in repr(thing), name
    # A star import takes no builtin's name that the lists rely on.
    shadowed = set(getattr(found, "__all__", dir(found))) & purity._MODULES[module]
    assert shadowed & (purity._FUNCTIONS | purity._VALUES | purity._LAZY) <= {"pow"}


def test_every_listed_builtin_exists() -> None:
    assert all(hasattr(builtins, n) for n in purity._FUNCTIONS | purity._VALUES | purity._LAZY)


# Everything that reaches outside, by the names one would use; whatever surrounds them.
OUTSIDE = st.sampled_from(
    ["open", "input", "eval", "exec", "compile", "__import__", "id", "hash", "globals", "vars",
     "dir", "getattr", "setattr", "object", "type", "super", "memoryview", "breakpoint", "help",
     "exit", "locals", "delattr", "hasattr", "__builtins__", "__loader__", "__spec__", "os", "time"]
)  # fmt: skip
AROUND = st.sampled_from(
    ["{}", "{}()", "print({})", "x = {}", "[{} for i in [1]]", "(lambda: {})()", "f'{{{}}}'",
     "def f(x={}): pass", "print(*[{}])", "map({}, [1])", "print({}.real)", "print(1 if {} else 2)",
     "for i in {}:\n    pass", "try:\n    {}\nexcept Exception:\n    pass", "{}[0] = 1",
     "@{}\ndef f(): pass"]
)  # fmt: skip


@given(OUTSIDE, AROUND, st.sampled_from(["", "import math\n", "from sympy import *\n"]))
def test_no_way_outside(name: str, around: str, before: str) -> None:
    assert not is_pure(before + around.format(name))


@given(st.text())
def test_any_text_is_judged(code: str) -> None:
    assert is_pure(code) in (True, False)
