"""Builds in a template, once, what every snippet would otherwise build lazily after its fork.

Loaded from its file by ``bootstrap.py``, so only the standard library is imported here. A routine
is a script, as a snippet is one: a family of calls on inputs no task would hold. Wanted are the
modules, tables, compiled patterns and specialised bytecode behind the calls, never their results:
what could show in a snippet (result caches, counters, warning registries) is forgotten at the end.
"""

from __future__ import annotations

import ast
import contextlib
import decimal
import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ROUTINES", "run"]

ROUTINES = {
    # The very first compile() builds some 120 AST types, the first f-string, match, class the rest.
    "language": r"""
import os as system, sys
from math import (pi as circle, e)
def outer(a, /, b: int = 2, *rest, key=None, **more) -> str:
    def inner():
        yield from (n for n in range(2) if n)
        return [*inner(), *rest]
    return f"{a!r:>{b + 6}} {b=} {3.14159:.2f} {10**6:,} {more}"
class Base:
    kind: str = "base"
    def __init__(self, value): self.value = value
    def __repr__(self): return "%s(%d)" % (type(self).__name__, self.value)
class Derived(Base):
    def __init__(self, value): super().__init__(value + 1)
    @property
    def twice(self): return self.value * 2
numbers = {k: v for k, v in zip("abc", (1, -2.5, 3j))} | {}
first, *others = sorted({1, 2, 3} - {2} ^ {9}, key=lambda n: -n)
print(outer(1, 2, 3, key=None, z=1), Base(3), Derived(7).twice, first, numbers, others)
print(True, None, ..., b"\0", (1,), [], set(), 1e300, 10**30, 0x1f, -0.0, sep="|", end="\n")
count = 0
while count < 12:
    count += 1
    if count == 3: continue
    elif count > 10: break
for index, letter in enumerate(reversed("xyz")): numbers[letter] = index << 2 >> 1 & 3 | 1 ^ ~0
if (size := len(numbers)) > 1 and not size < 0 or size is None: assert size, "empty"
match [1, {"k": 2}]:
    case [int(n), {"k": value, **other}] if n > 5: pass
    case Base(value=3) | "text" | None: pass
    case [first, *_] as whole: print(whole[0:1:1], whole[-1] if whole else ())
with open(system.devnull) as handle: handle.read()
try: raise ValueError("a") from KeyError("b")
except (TypeError, ValueError) as error: print(error, repr(error))
finally: del numbers["x"]
print(*map(str, filter(None, range(4))), sum(x % 3 // 2 for x in range(9)), max(2, 3), all([1]))
print(type(size), isinstance(size, int), divmod(9, 4), pow(3, 20, 7), round(2.567, 1), abs(-2))
print(bin(19), hex(9), "{:>9.3e}|{:,}|{:%}".format(1.5, 12345, 0.2), "%5.1f %s" % (2.25, "k"))
print("a-b".split("-"), ",".join("pq"), " k".strip().upper().replace("K", "m"), "q".zfill(3))
""",
    "tracebacks": r"""
import io, linecache, traceback
faulty = [
    "for n in range(3)\n    pass", "x = (1,", "def f():\nreturn 1", "print 'text'", "'unfinished",
    "x = 08", "\tx = 1\n  y = 2", "1 / 0", "{}['missing']", "int('seven')", "'1' + 1", "a b c",
    "def deep(n):\n    return deep(n - 1) if n else [][1]\ndeep(30)", "value_one = 1\nvalue_on",
    "import math\nmath.sqroot(2)", "import warm_missing_module", "assert 1 > 2, 'not so'",
    "try:\n    {}[1]\nexcept KeyError:\n    raise RuntimeError('again')", "if x = 3: pass",
    "raise ExceptionGroup('many', [ValueError(1), TypeError('two')])",
]
for source in faulty:
    linecache.cache["<warm>"] = (len(source), None, source.splitlines(keepends=True), "<warm>")
    try: exec(compile(source, "<warm>", "exec", dont_inherit=True), {})
    except Exception as error: traceback.print_exception(error, file=io.StringIO())
""",
    "stdlib": r"""
import cmath, collections, copy, dataclasses, datetime, decimal, fractions, functools, heapq
import itertools, json, math, operator, random, re, statistics, string, time
half = fractions.Fraction(355, 226)
decimal.getcontext().prec = 31
print(half + 1, half, float(half), half.limit_denominator(9), decimal.Decimal("1.7").sqrt() / 3)
math.comb(17, 4), math.isqrt(977), math.gcd(91, 65), math.lcm(6, 4), math.factorial(13)
math.hypot(2, 7), math.log(7, 3), math.prod((3, 5)), cmath.sqrt(-3), string.ascii_lowercase
tally = collections.Counter(map(sum, itertools.product(range(5), repeat=2)))
print(tally.most_common(2), tally, collections.defaultdict(list), collections.deque([4]))
list(itertools.permutations("pqr")), list(itertools.combinations(range(4), 3)), time.perf_counter()
print(collections.namedtuple("Warm", "p q")(1, 2), heapq.nsmallest(2, [8, 6, 7]))
Record = dataclasses.make_dataclass("Record", [("p", int), ("q", list, None)], order=True)
print(Record(3), Record(3) == Record(4), copy.deepcopy({"p": [3]}))
cached = functools.lru_cache(maxsize=None)(lambda n: n if n < 2 else cached(n - 1) + cached(n - 2))
cached(9), functools.reduce(operator.sub, (9, 4)), functools.partial(pow, 2)(3)
re.findall(r"(\d+)-(\w+)", "17-ab 4-c"), re.sub(r"\s{2,}", "_", "p   q")
print(re.match(r"^(?P<warm>[a-f]+)?$", "fade"), re.split(r"[,;]\s*", "k,m; n"))
json.loads('{"p": [1, 2.5, null, true, "\\u00e9"]}'), json.dumps({"q": [{}]}, indent=1)
own = random.Random(977)
own.randint(3, 9), own.sample(range(7), 2), own.gauss(0, 1), own.shuffle([1, 2]), own.choice("pq")
statistics.mean([2, 7.5]), statistics.stdev([2, 4, 9]), statistics.median([4, 1])
day = datetime.datetime.strptime("2031-05-17 08:03", "%Y-%m-%d %H:%M")
print(day, repr(day), day.strftime("%A %d %B"), day - datetime.timedelta(days=3), day.date())
""",
    "numpy": r"""
import numpy as np
grid = np.arange(12, dtype=float).reshape(3, 4) / 7
whole = np.array([[3, 1, 1], [1, 5, 2], [1, 2, 7]])
for dtype in (np.int64, np.float64, np.complex128, np.bool_, np.float32, object):
    print(whole.astype(dtype), repr(whole[0].astype(dtype)), whole[0, 0].astype(dtype))
grid.mean(axis=0), grid.std(), grid.max(), grid.sum(axis=1), grid.T @ grid, grid[grid > 1]
np.sin(grid), np.exp(grid), np.sqrt(grid), grid**2 - grid * 3, whole // 2 % 3, grid[::2]
np.linspace(0, 2, 3), np.where(grid > 1, 1, 0), np.unique(whole, return_counts=True)
np.cumsum(whole), np.diff(whole), np.sort(whole), np.argsort(grid), np.dot(whole, whole)
np.vstack([whole, whole]), np.zeros(2), np.eye(2), np.round(grid, 2), np.outer([1], [2])
np.einsum("ij,jk->ik", whole, whole), np.cross(whole[0], whole[1]), np.allclose(grid, grid)
np.percentile(grid, 30), np.median(grid), np.histogram(grid, 3), np.var(grid), np.corrcoef(grid)
for name in ("det", "inv", "eig", "eigvals", "eigh", "svd", "qr", "norm", "cholesky", "pinv"):
    print(getattr(np.linalg, name)(whole))
np.linalg.solve(whole, [1, 2, 4]), np.linalg.matrix_rank(whole), np.linalg.matrix_power(whole, 3)
np.linalg.lstsq(grid, [1, 2, 4]), np.fft.fft(grid), np.interp(2.5, [1, 3], [2, 9])
np.roots([2, -9, 4, 1]), np.polyfit([0, 1, 3], [1, 3, 8], 1)
own = np.random.default_rng(977)
own.normal(size=3), own.integers(0, 9, 3), own.choice(5, 2), own.permutation(4), own.random()
# The guest reseeds the shared generator in every child.
np.random.rand(2), np.random.randint(0, 5, 2), np.random.choice(4, 2), np.random.normal(size=2)
""",
    "pandas": r"""
import io, numpy as np, pandas as pd
frame = pd.DataFrame({"p": [3, 1, 7, 9], "q": list("kmkm"), "r": [0.7, 2.9, np.nan, 4.1]})
print(frame, frame.describe(), frame.dtypes, frame["p"], frame.iloc[0], frame.q.value_counts())
frame.groupby("q").agg({"p": "sum", "r": "mean"}), frame.groupby("q").p.mean(), frame.info()
frame[frame.p > 2], frame.sort_values("r"), frame.loc[1:2, "p"], frame.fillna(0), frame.dropna()
frame.merge(frame, on="q"), pd.concat([frame, frame]), frame.pivot_table(values="p", index="q")
frame.apply(lambda row: row.p, axis=1), frame.q.str.upper(), frame[["p", "r"]].corr()
table = pd.read_csv(io.StringIO("day,count\n2031-05-17,4\n2031-05-19,8\n"), parse_dates=["day"])
print(table.set_index("day").resample("D").sum(), pd.to_datetime(["2033-11-02"]), table.to_csv())
""",
    "sympy_core": r"""
from sympy import *
from sympy.parsing import sympy_parser as parser
p, q, r = symbols("warm_p warm_q warm_r")
n = Symbol("warm_n", integer=True, positive=True)
mixed = sqrt(p + 3) / 7 + exp(-q) * cos(r) ** 2 + log(p) * pi + I * n
relation = Eq(Integral(mixed, (p, 1, q)), Sum(1 / n, (n, 2, r)))
matrix = Matrix([[p, Rational(3, 17)], [oo, q]])
for value in (mixed, relation, matrix, Derivative(mixed, p), p >= q, Interval(1, 3), {p: [q]}):
    print(value, repr(value), latex(value), pretty(value), srepr(value))
pprint(mixed)
mixed.subs({p: 2, q: 5, r: 1}).evalf(), N(sqrt(11) * E, 33), Float("0.7") * 3, mixed.atoms()
sympify("warm_p**3 - 4*sin(warm_p)/9"), nsimplify(0.4375), sqrtdenest(sqrt(7 + 2 * sqrt(10)))
rules = (*parser.standard_transformations, parser.implicit_multiplication_application)
parser.parse_expr("5 warm_p + 2", transformations=rules), mixed.free_symbols
lambdify([p, q], mixed.subs(r, p), "numpy"), lambdify(p, sin(p), "math")(0.3)
lambdify(p, matrix[:, 0])(3), lambdify(p, p**2 + gamma(p), "mpmath")(1.3)
Piecewise((p, p > 3), (q, True)).subs(p, 9), Abs(-p * 3), Max(p, 3), floor(n / 3), ceiling(p)
re(3 + I * q), arg(2 + 2 * I), expand((2 - 3 * I) ** 3), conjugate(p * I), Abs(5 - 12 * I)
simplify_logic((p & q) | (p & r)), satisfiable(p & ~q), to_cnf(p >> q), ask(Q.even(n * 2))
mixed.replace(cos, sin), mixed.has(log), mixed.rewrite(exp), mixed.as_independent(p), cse(mixed)
""",
    "sympy_algebra": r"""
from sympy import *
p, q, r = symbols("warm_p warm_q warm_r")
above = Symbol("warm_above", positive=True)
product = expand((p - 3 * q) ** 2 * (p**2 + 7))
factor(product), factor(p**8 - 256), factor_list(27 * p**3 - 8), collect(product, p)
apart((p + 9) / (p**3 - 4 * p), p), together(3 / p - q / 7), cancel((p**3 - 27) / (p - 3))
gcd(p**2 - 49, p - 7), lcm(p**2 - 9, p + 3), div(p**4 - 2, p**2 + 3, p), fraction(p / 3)
resultant(p**2 - 5, p - q, p), discriminant(p**3 + 4 * p - 7, p), degree(p**7 - 2)
groebner([p * q - 7, p - q**2 + 3], p, q, order="lex"), real_roots(p**3 - 9 * p + 1)
poly = Poly(7 * p**4 - 3 * p + 11, p)
print(poly, poly.nroots(), poly.all_coeffs(), poly.degree(), poly(3), poly.factor_list())
roots(p**3 - 12 * p**2 + 5), minimal_polynomial(sqrt(5) - sqrt(7), p)
interpolate([(1, 8), (2, 5)], p), symmetrize(p**2 + q**2, [p, q]), horner(p**3 + 5 * p)
Poly(p**5 - p - 3, p, modulus=11).factor_list(), rem(p**3 - 5, p - 2), quo(p**3 - 5, p - 2)
simplify((p**2 - 16) / (p + 4) + sin(q) ** 2 * 3 + 3 * cos(q) ** 2), expand_trig(cos(3 * p))
trigsimp(cot(p) * sin(p)), simplify(sqrt(45) - sqrt(20)), radsimp(3 / (sqrt(7) - 2))
gammasimp(gamma(p + 3) / gamma(p + 1)), combsimp(binomial(p, 3) / p), besselsimp(besselj(1, p))
powsimp(p**q * p**r), logcombine(log(above) * 3 - log(7)), expand_log(log(7 * above)), cos(pi / 10)
""",
    "sympy_solve": r"""
from sympy import *
p, q, r = symbols("warm_p warm_q warm_r")
real, above = Symbol("warm_real", real=True), Symbol("warm_above", positive=True)
solve(7 * p**2 - 11 * p - 30, p), solve(2 * p**3 - 7 * p + 4, p), solve(p * q - 7 * r, q)
solve([7 * p - q - 4, p + 9 * q - 2], [p, q]), solve([real**2 + q**2 - 13, real * q - 6])
solve([p**2 - q - 7, p + q - 5], [p, q], dict=True), solve(Abs(real - 11) - 4), solve(tan(p) - 1)
solve(exp(3 * p) - 5 * exp(p), p), solve(sqrt(2 * p + 7) - p + 4, p), solve(3 / p + p - 9, p)
solve(7**above - 343), checksol(p**2 - 4, p, 2), solveset(p**2 - 13, p, S.Reals)
solveset(sin(p) - Rational(1, 3), p, Interval(0, 4)), solveset(exp(p) - 9, p)
solve_univariate_inequality(real**2 - 9 * real + 8 < 0, real), solve(real**3 > 9 * real, real)
reduce_inequalities([real > 4, real**2 < 77], real), reduce_inequalities(Abs(real - 6) < 11, real)
linsolve([p + 4 * q - 9, p - q], [p, q]), nonlinsolve([p**2 - 3 * q, p - q + 1], [p, q])
solve_poly_system([p**2 - q - 5, q - 3 * p], p, q), nsolve(exp(p) - 4 * p - 3, p, 2)
""",
    "sympy_calculus": r"""
from sympy import *
from sympy.calculus.util import continuous_domain, function_range
p, q, s = symbols("warm_p warm_q warm_s")
n = Symbol("warm_n", integer=True, positive=True)
t, u = symbols("warm_t warm_u", positive=True)
real = Symbol("warm_real", real=True)
diff(p**7 * sin(q * p), p, 2), diff(atan(5 * p) + log(p) ** p, p), (tan(p) * sqrt(p)).diff(p)
for function in (4 * p**3 - 9, sin(5 * p) ** 3, p * exp(4 * p), 3 / (p**2 + 11), sec(p) ** 2):
    integrate(function, p)
# The first integral over an infinite range builds the table of Meijer G functions.
integrate(exp(-3 * p**2), (p, -oo, oo)), integrate(1 / (9 + p**2), (p, 0, oo))
integrate(sqrt(13 - p**2), p), integrate(exp(2 * p) * sin(3 * p), p)
integrate(p**4 - 3 * p, (p, 2, 5)), integrate(sin(7 * p) / p, (p, 0, oo))
integrate(log(p) / 3, (p, 1, 7)), integrate(p * q**2, (p, 0, q), (q, 1, 3))
integrate(Abs(real - 2), (real, 0, 7)), Integral(exp(-(p**5)), (p, 0, 2)).evalf()
limit(tan(5 * p) / p, p, 0), limit((1 + 7 / n) ** n, n, oo), limit((p**2 - 25) / (p - 5), p, 5)
limit(log(p) / p**3, p, oo), limit(1 / p, p, 0, "-"), limit(sqrt(n**2 + 9 * n) - n, n, oo)
series(log(1 + 4 * p), p, 0, 4), series(1 / (1 - 5 * p), p, 0, 4), series(tan(p), p, 0, 4)
summation(n**4, (n, 1, p)), summation(7 / n**4, (n, 1, oo)), summation(p**n, (n, 0, 9))
summation(5 / (n * (n + 3)), (n, 1, oo)), summation(Rational(3, 11) ** n, (n, 0, oo))
summation(7**n / factorial(n), (n, 0, oo)), summation(binomial(9, n), (n, 0, 9))
Sum(n * 3**n, (n, 1, q)).doit(), product(n + 4, (n, 1, 6)), product(3 * n, (n, 1, q))
f = Function("warm_f")
dsolve(f(p).diff(p) - 9 * f(p), f(p)), dsolve(f(p).diff(p, 2) - 9 * f(p) - exp(p), f(p))
dsolve(f(p).diff(p, 2) + 25 * f(p), f(p), ics={f(0): 3, f(p).diff(p).subs(p, 0): 4})
rsolve(f(n) - 5 * f(n - 1) + 6 * f(n - 2), f(n), {f(0): 3, f(1): 7})
laplace_transform(exp(-5 * t), t, u), inverse_laplace_transform(3 / (u**2 + 16), u, t)
fourier_series(p, (p, -1, 1)).truncate(2), minimum(real**2 - 7 * real, real)
stationary_points(real**4 - 2 * real**2, real), is_increasing(real**3, S.Reals)
continuous_domain(log(real - 3), real, S.Reals), function_range(real**2 - 5, real, S.Reals)
""",
    "sympy_matrices": r"""
from sympy import *
p, q = symbols("warm_p warm_q")
whole = Matrix([[4, 1, 2], [1, 7, 3], [2, 3, 9]])
for matrix in (whole, Matrix([[5, 7], [2, 9]]), Matrix([[p, q], [q, 3 * p]])):
    matrix.det(), matrix.inv(), matrix.rank(), matrix.rref(), matrix.T * matrix, matrix**3
    matrix.trace(), matrix.charpoly(), matrix.eigenvals(), matrix.nullspace(), matrix.adjugate()
for matrix in (Matrix([[5, 7], [2, 9]]), Matrix([[p, q], [q, p]])):
    matrix.eigenvects(), matrix.diagonalize()
whole.LUsolve(Matrix([1, 5, 2])), whole.LUdecomposition(), whole.QRdecomposition(), zeros(2)
whole.col_join(ones(1, 3)), whole.applyfunc(lambda entry: entry % 5), diag(3, 8)
Matrix([[3, 1], [0, 3]]).jordan_form(), (Matrix([[0, 3], [0, 0]]) * p).exp()
whole[:, 0].dot(whole[:, 1]), whole[:, 0].cross(whole[:, 1]), whole[:, 0].norm(), eye(2)
Matrix([p**3 * q]).jacobian([p, q]), hessian(p**3 * q**2, (p, q)), wronskian([sin(p), p], p)
""",
    "sympy_discrete": r"""
from sympy import *
from sympy.functions.combinatorial.numbers import nC, nP, stirling
from sympy.ntheory import digits, discrete_log, n_order, nthroot_mod, primitive_root, sqrt_mod
from sympy.ntheory.continued_fraction import continued_fraction
from sympy.ntheory.modular import crt
from sympy.solvers.diophantine import diophantine
from sympy.utilities.iterables import multiset_permutations, partitions, subsets
from sympy.combinatorics import Permutation, PermutationGroup, SymmetricGroup
p, q = symbols("warm_p warm_q", integer=True)
factorint(977 * 1009 * 64), factorint(10**15 + 37), isprime(104723), list(primerange(60, 90))
nextprime(977), prevprime(90), prime(33), primepi(77), totient(91), divisors(84)
divisor_count(90), divisor_sigma(76), mobius(77), gcd(91, 26), lcm(8, 22), mod_inverse(7, 19)
primefactors(770), integer_nthroot(343, 3), multiplicity(3, 162), perfect_power(243), Mod(77, 9)
crt([7, 11], [4, 9]), n_order(5, 17), primitive_root(31), discrete_log(37, 9, 2), sqrt_mod(4, 29)
nthroot_mod(8, 3, 23), digits(977, 7), list(continued_fraction(Rational(77, 13)))
for equation in (9 * p + 14 * q - 5, p**2 - 7 * q**2 - 1, p**2 + q**2 - 85, p * q - 3 * p - 10):
    diophantine(equation)
binomial(19, 8), factorial(17), fibonacci(37), lucas(9), catalan(8), bernoulli(10), bell(6)
stirling(7, 3), harmonic(9), subfactorial(6), factorial2(9), rf(p, 3), ff(7, 3), nC(8, 3), nP(6, 2)
list(multiset_permutations("wwx")), list(partitions(5)), list(subsets([7, 8]))
turn = Permutation([2, 0, 1, 4, 3])
print(turn, turn.order(), turn**2, PermutationGroup([turn]).order(), SymmetricGroup(3).order())
span = Interval(2, 9)
span & Interval(4, 11), Union(span, FiniteSet(12)), span - Interval.open(3, 4), span.contains(5)
FiniteSet(2, 5, 7).powerset(), ProductSet(span, span), ImageSet(Lambda(p, 3 * p), S.Integers)
S.Reals - span, Range(2, 19, 5), Complement(S.Integers, span)
""",
    "sympy_geometry": r"""
from sympy import *
corner, far, top = Point(2, 1), Point(14, 1), Point(2, 6)
triangle, circle, base = Triangle(corner, far, top), Circle(corner, 6), Line(corner, far)
triangle.area, triangle.circumcenter, triangle.incenter, triangle.incircle, triangle.centroid
triangle.orthocenter, triangle.angles, triangle.perimeter, triangle.medians, corner.distance(far)
circle.intersection(Line(corner, top)), circle.area, circle.equation(), base.distance(top)
base.intersection(Line(top, Point(3, -3))), base.perpendicular_line(top).equation()
Segment(corner, top).midpoint, Polygon(corner, far, top, Point(0, 7)).area, base.slope
Point3D(1, 2, 7).distance(Point3D(3, 3, 3)), Plane((0, 1, 7), normal_vector=(2, 3, 1)).equation()
""",
    "sympy_stats": r"""
from sympy import Symbol
from sympy.stats import Binomial, Die, E, Exponential, Normal, P, Poisson, density, variance
import sympy.tensor.array.array_derivatives, sympy.tensor.array.expressions
die, normal, tosses = Die("warm_d", 9), Normal("warm_g", 2, 5), Binomial("warm_b", 7, 0.3)
E(die), P(die > 7), variance(die), E(die**2, die > 3), density(die), P(tosses > 3), E(tosses)
E(normal), density(normal)(Symbol("warm_p")), E(Exponential("warm_e", 7)), Poisson("warm_k", 3)
""",
    "mpmath": r"""
from mpmath import *
with workdps(27):
    print(mpf("1.7") / 3, pi, sin(3), exp(2), log(7), sqrt(13), mpc(2, 3), nstr(+pi, 9))
    gamma(3.3), zeta(5), matrix([[3, 1], [2, 8]]) ** -1, binomial(9, 4), erf(0.7), besselj(1, 2)
    quad(lambda v: v**3, [0, 3]), findroot(lambda v: v**2 - 7, 2), diff(sin, 2), identify(1.5)
    nsum(lambda v: 1 / v**4, [1, inf]), polyroots([1, -9, 5]), limit(lambda v: sin(v) / v, 0)
""",
    "scipy": r"""
import numpy as np
from scipy import integrate, linalg, optimize, signal, sparse, spatial
from scipy.sparse.linalg import eigs, spsolve
def bowl(v): return (v[0] - 7) ** 2 + 3 * (v[1] + 4) ** 2
for method in ("BFGS", "Nelder-Mead", "L-BFGS-B", "SLSQP", "CG", "Powell", "COBYLA"):
    print(optimize.minimize(bowl, [3, 3], method=method))
tied = [{"type": "ineq", "fun": lambda v: 6 - v[0]}, {"type": "eq", "fun": lambda v: v[0] - v[1]}]
optimize.minimize(bowl, [3, 3], bounds=[(0, 5), (0, 5)], constraints=tied)
optimize.minimize_scalar(lambda v: (v - 7) ** 2), optimize.newton(lambda v: v**2 - 11, 3)
optimize.fsolve(lambda v: v**3 - 11, 2), optimize.brentq(lambda v: v**2 - 7, 0, 5)
print(optimize.root(lambda v: [v[0] + 3 * v[1] - 9, v[0] ** 2 - v[1]], [1, 1]))
print(optimize.linprog([-3, -7], A_ub=[[1, 4], [2, 1]], b_ub=[9, 8], A_eq=[[1, 1]], b_eq=[3]))
optimize.milp([-3, -7], constraints=optimize.LinearConstraint([[1, 4]], ub=9), integrality=[1, 1])
steps = np.linspace(0, 3, 9)
optimize.curve_fit(lambda v, a, b: a * np.exp(-b * v), steps, 5 * np.exp(-0.7 * steps))
optimize.least_squares(bowl, [1, 1]), optimize.linear_sum_assignment([[4, 1], [2, 7]])
integrate.quad(np.cos, 0, 2), integrate.quad(lambda v: np.exp(-v), 0, np.inf)
integrate.dblquad(lambda v, w: v * w, 0, 2, 0, 3), integrate.trapezoid(steps, steps)
integrate.odeint(lambda v, t: -3 * v, 2, steps), integrate.simpson(steps, x=steps)
for method in ("RK45", "Radau", "LSODA"):
    integrate.solve_ivp(lambda t, v: [v[1], -3 * v[0]], [0, 1], [2, 1], method, t_eval=[0.5, 1])
whole = np.array([[5.0, 1, 2], [1, 7, 3], [2, 3, 8]])
for name in ("expm", "lu", "eigh", "eig", "inv", "det", "svd", "qr", "cholesky", "null_space"):
    getattr(linalg, name)(whole)
linalg.solve(whole, [1, 3, 2]), linalg.lstsq(whole, [1, 3, 2]), linalg.sqrtm(whole)
band = sparse.csc_matrix([[4.0, 1, 0, 0], [0, 4, 1, 0], [0, 0, 4, 1], [0, 0, 0, 4]])
print(band, band.toarray(), band @ np.ones(4), spsolve(band, np.ones(4)), band.tocsr().tocoo())
eigs(band, k=1), signal.convolve([1, 3], [2, 5]), signal.find_peaks([1, 5, 2])
points = np.array([[0, 0], [3, 0], [0, 4], [1, 1.0], [3, 5]])
spatial.ConvexHull(points), spatial.distance.cdist(points, points), spatial.KDTree(points)
""",
    "scipy_stats": r"""
from scipy import interpolate, special, stats
sample, other = [3.1, 4.7, 2.2, 5.9, 4.4], [2.9, 5.3, 3.8, 6.1, 4.9]
for law in (stats.norm(2, 3), stats.t(7), stats.chi2(4), stats.f(3, 9), stats.expon(scale=3)):
    law.cdf(1.3), law.pdf(1.3), law.ppf(0.7), law.sf(1.3), law.mean(), law.rvs(2, random_state=977)
for law in (stats.binom(9, 0.3), stats.poisson(4), stats.geom(0.3), stats.hypergeom(20, 7, 5)):
    law.cdf(3), law.pmf(3), law.ppf(0.7), law.mean(), law.rvs(2, random_state=977)
print(stats.ttest_ind(sample, other), stats.ttest_1samp(sample, 4), stats.ttest_rel(sample, other))
print(stats.linregress(sample, other), stats.pearsonr(sample, other), stats.describe(sample))
stats.spearmanr(sample, other), stats.mannwhitneyu(sample, other), stats.f_oneway(sample, other)
stats.shapiro(sample), stats.chisquare([7, 9, 11]), stats.chi2_contingency([[7, 9], [4, 12]])
special.gamma(4.4), special.comb(9, 4, exact=True), special.factorial(7), special.erf(0.3)
special.jv(1, 2.2), special.beta(3, 4), special.zeta(3), special.expit(0.4), special.lambertw(1.7)
interpolate.interp1d(sample, other, "cubic")(2.7), interpolate.CubicSpline([1, 2, 4], [1, 7, 3])(3)
""",
}
"""Every routine's script by name; ``Tier.routines`` lists some of the names."""

# Leaves no result behind: a snippet finds caches as empty as a new interpreter's. A cached function
# without arguments is kept: it holds a table of rules, which every later call would build anew.
_FORGET = r"""
import inspect, linecache, sys
for name in [name for name in linecache.cache if name.startswith("<")]: del linecache.cache[name]
if "sympy" in sys.modules:
    for cached in sys.modules["sympy.core.cache"].CACHE:
        if inspect.signature(cached).parameters.keys() - {"cls"}: cached.cache_clear()
    sys.modules["sympy.ntheory.generate"].sieve._reset()
    # It numbers the file names that tracebacks show.
    sys.modules["sympy.utilities.lambdify"]._lambdify_generated_counter = 1
"""


def run(names: Iterable[str]) -> list[str]:
    """Run the routines ``names`` in order, without output; returns a line for each that stumbled.

    A statement that raises (another version of its library) is skipped, noted on stderr and in
    the answer as ``routine:line: error``: the template is then slower, not broken.

    Raises:
        ValueError: A name is no routine of this file.
    """
    chosen = list(names)
    if unknown := [name for name in chosen if name not in ROUTINES]:
        raise ValueError(f"warm-up routines {unknown}, expected some of {list(ROUTINES)}")
    # "ignore" also keeps warnings out of the registries that would silence a snippet's own.
    with (
        open(os.devnull, "w", encoding="utf-8") as sink,  # noqa: PTH123
        contextlib.redirect_stdout(sink),
        warnings.catch_warnings(),
        decimal.localcontext(),
    ):
        warnings.simplefilter("ignore")
        stumbles = [line for name in chosen for line in _run_script(name, ROUTINES[name])]
        stumbles += _run_script("forget", _FORGET)
    for line in stumbles:
        print(f"warm-up skipped {line}", file=sys.stderr)
    return stumbles


def _run_script(name: str, script: str) -> list[str]:
    compile(script, "<warm>", "exec", dont_inherit=True)  # as a snippet is compiled: in one piece
    stumbles = []
    scope = {"__name__": "warm"}
    for statement in ast.parse(script).body:
        piece = ast.Module([statement], [])
        try:
            exec(compile(piece, "<warm>", "exec", dont_inherit=True), scope)  # noqa: S102
        except Exception as error:  # noqa: BLE001  (any library may raise anything)
            stumbles.append(f"{name}:{statement.lineno}: {type(error).__name__}: {error}")
    return stumbles
