"""Whether a snippet's result depends on nothing but its text.

An allow-list, of syntax, modules, names and attributes: what is not known to be harmless is impure.
A wrong "no" costs one run that could have been saved, a wrong "yes" gives a result that the snippet
might not have had. So clocks, randomness, files, network, processes, threads, ``eval`` and the like
need no mention, since nothing that is listed leads to them; what does need care is

* addresses, which ``repr`` shows of functions, lambdas, bound methods, generators and iterators:
  these may be called or consumed where they stand, never kept, passed on or printed;
* ``sympy``, which evaluates strings: next to it a string holds no bracket and no dot, and none is
  made, except to be printed at once;
* names of the language that are bound anew, after which they no longer mean what the list says.

The order of a set of strings follows the hash seed, which ``NativeSandbox`` keeps the same for all
snippets of a tier; it does not count as impure.
"""

from __future__ import annotations

import ast
import re
import warnings

__all__ = ["is_pure"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Builtins that may be called, and passed to what calls them.
_FUNCTIONS = _names(
    "abs all any bin bool bytes chr complex dict divmod float frozenset hex int isinstance len list"
    " max min next oct ord pow print range repr round set slice sorted str sum tuple"
)
_VALUES = _names(
    "ArithmeticError AssertionError AttributeError Exception IndexError KeyError LookupError"
    " NameError NotImplementedError OverflowError RuntimeError StopIteration TypeError ValueError"
    " ZeroDivisionError"
)
# What gives an iterator, whose repr is an address: only where it is consumed on the spot.
_LAZY = _names("enumerate filter iter map reversed zip")
# By whom; methods have a dot in front.
_CONSUMERS = _LAZY | _names(
    "all any dict frozenset list max min next set sorted sum tuple Counter deque fsum mean prod"
    " reduce accumulate chain combinations combinations_with_replacement compress cycle dropwhile"
    " islice pairwise permutations product starmap takewhile zip_longest"
    " .difference .extend .intersection .join .union .update"
)
# Where they do not take one in any place; in the others it may come back as it is.
_PLACE_OF_ITERATOR = {"next": 0, "reduce": 1, "iter": 0, "accumulate": 0}
# Which argument is a function that is called and not kept; its name for keywords.
_TAKES_FUNCTION: dict[str, int | str] = {
    "accumulate": 1, "dropwhile": 0, "filter": 0, "map": 0, "max": "key",
    "min": "key", "reduce": 0, "sorted": "key", ".sort": "key", "starmap": 0, "takewhile": 0,
}  # fmt: skip
_DECORATORS = _names("cache lru_cache")
_MODULES = {
    "math": _names(
        "acos acosh asin asinh atan atan2 atanh cbrt ceil comb copysign cos cosh degrees dist e erf"
        " erfc exp exp2 expm1 fabs factorial floor fmod frexp fsum gamma gcd hypot inf isclose"
        " isfinite isinf isnan isqrt lcm ldexp lgamma log log10 log1p log2 modf nan perm pi pow"
        " prod radians remainder sin sinh sqrt tan tanh tau trunc"
    ),
    "cmath": _names("cos exp log phase pi polar rect sin sqrt tan"),
    "fractions": _names("Fraction"),
    "decimal": _names("Decimal getcontext ROUND_DOWN ROUND_HALF_EVEN ROUND_HALF_UP"),
    "itertools": _names(
        "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile"
        " islice pairwise permutations product repeat starmap takewhile zip_longest"
    ),
    "functools": _names("cache lru_cache reduce"),
    "collections": _names("Counter OrderedDict defaultdict deque"),
    "statistics": _names("fmean mean median mode pstdev pvariance stdev variance"),
    "string": _names("ascii_letters ascii_lowercase ascii_uppercase digits"),
    "sympy": _names(
        "Abs Add E Eq FiniteSet Function Ge Gt I Integer Interval Le Lt Matrix Max Min Mod Mul Ne"
        " Poly Pow Rational S Sum Symbol apart binomial cancel ceiling collect cos diff divisors"
        " expand exp factor factorial factorint fibonacci floor gcd integrate isprime lcm limit log"
        " nextprime nsimplify nsolve oo pi prevprime prime primefactors primepi rem sin simplify"
        " solve solveset sqrt symbols tan together totient trigsimp"
    ),
}
_LAZY_IMPORTS = _MODULES["itertools"]
_METHODS = _names(
    "add append appendleft bit_count bit_length capitalize clear copy count denominator difference"
    " discard endswith extend find index insert intersection is_integer isalpha isdigit isdisjoint"
    " islower isspace issubset issuperset isupper items join keys ljust lower lstrip most_common"
    " pop popleft remove replace reverse rfind rjust rotate rsplit rstrip setdefault sort split"
    " splitlines startswith strip swapcase symmetric_difference title union update upper values"
    " zfill as_integer_ratio limit_denominator conjugate get"
    " all_coeffs as_numer_denom coeff degree det diff doit eigenvals evalf expand factor has"
    " integrate inv is_zero limit n nroots nullspace rank rref simplify solve subs transpose"
)
_DATA = _names("denominator free_symbols imag lhs numerator prec real rhs")
# Constants and classes among the imported names; the others are functions.
_VALUES_IMPORTED = _names(
    "ascii_letters ascii_lowercase ascii_uppercase defaultdict deque digits e inf nan oo pi tau"
)
_SAFE_TEXT = re.compile(r"[\w ,:+\-=*/^]*")
_MAKES_TEXT = _names("bin bytes chr hex oct repr str")
_SYNTAX = (
    ast.Module, ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.While, ast.If,
    ast.Break, ast.Continue, ast.Pass, ast.Return, ast.Raise, ast.Try, ast.ExceptHandler,
    ast.Assert, ast.Delete, ast.Global, ast.Nonlocal, ast.FunctionDef, ast.arguments, ast.arg,
    ast.Lambda, ast.Import, ast.ImportFrom, ast.alias, ast.BoolOp, ast.NamedExpr, ast.BinOp,
    ast.UnaryOp, ast.IfExp, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp, ast.comprehension, ast.Compare, ast.Call, ast.keyword, ast.FormattedValue,
    ast.JoinedStr, ast.Constant, ast.Attribute, ast.Subscript, ast.Starred, ast.Name, ast.List,
    ast.Tuple, ast.Slice, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def is_pure(code: str) -> bool:
    """Whether every run of ``code`` gives the same result, as far as this can tell.

    What does not parse is not pure: there is nothing to save in running it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that is for whoever runs it to show
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    try:
        return _Judge(tree).approves()
    except RecursionError:
        return False


class _Judge:
    """Collects what the names of one tree stand for, then looks at every node in its place."""

    def __init__(self, tree: ast.Module) -> None:
        self._modules: dict[str, str] = {}
        self._imported: dict[str, str] = {}  # to the name in its module
        self._functions: set[str] = set()
        self._bound: set[str] = set()
        self._sympy = False
        self._known_imports = True
        self._parents: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(tree):
            self._collect(node)
            self._parents |= dict.fromkeys(ast.iter_child_nodes(node), node)

    def _collect(self, node: ast.AST) -> None:
        match node:
            case ast.Import():
                for alias in node.names:
                    self._known_imports &= alias.name in _MODULES and alias.asname != "__builtins__"
                    self._sympy |= alias.name == "sympy"
                    self._modules[alias.asname or alias.name] = alias.name
            case ast.ImportFrom():
                known = (
                    frozenset[str]() if node.level else _MODULES.get(node.module or "", frozenset())
                )
                self._sympy |= node.module == "sympy"
                for alias in node.names:
                    names = known if alias.name == "*" else {alias.name}
                    self._known_imports &= bool(known) and names <= known
                    self._known_imports &= alias.asname != "__builtins__"
                    self._imported |= {alias.asname or name: name for name in names}
            case ast.FunctionDef(name=name):
                self._functions.add(name)
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                self._bound.add(name)
            case ast.ExceptHandler(name=str(name)):
                self._bound.add(name)

    def approves(self) -> bool:
        """Whether all of the tree is known to be harmless."""
        groups = [{*self._modules}, {*self._imported}, _FUNCTIONS | _VALUES | _LAZY]
        groups += [self._functions, self._bound]
        # One name, one meaning; but star imports bring functions that are builtins as well.
        taken = [a & b for i, a in enumerate(groups) for b in groups[:i]]
        if not self._known_imports or any(clash - {"pow"} for clash in taken):
            return False
        return all(self._allows(node, parent) for node, parent in self._parents.items())

    def _allows(self, node: ast.AST, parent: ast.AST) -> bool:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                return self._allows_name(name, node, parent)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                return not name.startswith("__")
            case ast.ExceptHandler(name=str()):
                return not self._sympy  # its message is a string that somebody else has made
            case ast.keyword(arg="generator"):  # asks sympy for one
                return False
            case ast.Attribute():
                return self._allows_attribute(node, parent)
            case ast.Lambda():
                return self._is_only_called(node, parent)
            case ast.GeneratorExp():
                return self._is_consumed(node, parent)
            case ast.Call() if self._called(node) in _LAZY | _MODULES["itertools"]:
                return self._is_consumed(node, parent)
            case ast.Call() | ast.Constant() | ast.JoinedStr():
                return not self._sympy or self._is_safe_text(node, parent)
        return isinstance(node, _SYNTAX)

    def _allows_name(self, name: str, node: ast.Name, parent: ast.AST) -> bool:
        called = isinstance(parent, ast.Call) and parent.func is node
        if name in self._modules:
            return isinstance(parent, ast.Attribute)
        if name in self._imported:
            name = self._imported[name]
            if name in _DECORATORS:
                return self._is_decorator(node, parent)
            return called or self._is_value(name) or self._is_only_called(node, parent)
        if name in self._functions:
            return called or self._is_only_called(node, parent)
        if name in _LAZY or (self._sympy and name in _MAKES_TEXT):
            return called
        return name in _FUNCTIONS | _VALUES | self._bound | {"__name__"}

    def _allows_attribute(self, node: ast.Attribute, parent: ast.AST) -> bool:
        called = isinstance(parent, ast.Call) and parent.func is node
        if not isinstance(node.ctx, ast.Load):
            return node.attr == "prec"  # of decimal's context
        if isinstance(node.value, ast.Name) and node.value.id in self._modules:
            if node.attr in _DECORATORS:
                return self._is_decorator(node, parent)
            known = node.attr in _MODULES[self._modules[node.value.id]]
            value = self._is_value(node.attr) or self._is_only_called(node, parent)
            return known and (called or value)
        return node.attr in (_METHODS if called else _DATA)

    def _is_value(self, name: str) -> bool:
        return name[0].isupper() or name in _VALUES_IMPORTED

    def _called(self, call: ast.Call) -> str | None:
        """What a call calls, as the lists have it; ``None`` for a function of the snippet."""
        match call.func:
            case ast.Name(id=name) if name in _FUNCTIONS | _LAZY:
                return name
            case ast.Name(id=name):
                return self._imported.get(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in self._modules:
                return name
            case ast.Attribute(attr=name):
                return f".{name}"
        return None

    def _is_consumed(self, node: ast.AST, parent: ast.AST) -> bool:
        """Whether an iterator is used up where it stands."""
        match parent:
            case ast.Call() if node in parent.args:
                name, place = self._called(parent), parent.args.index(node)
                if name in ("max", "min"):
                    return len(parent.args) == 1
                return name in _CONSUMERS and place == _PLACE_OF_ITERATOR.get(name, place)
            case ast.For() | ast.comprehension():
                return parent.iter is node
            case ast.Assign(targets=[ast.Tuple()]):
                return True
        return isinstance(parent, ast.Starred)

    def _is_only_called(self, node: ast.AST, parent: ast.AST) -> bool:
        """Whether a function stands where something calls it and does not keep it."""
        place: int | str | None = None
        call = parent
        if isinstance(parent, ast.keyword):
            place, call = parent.arg, self._parents[parent]
        elif isinstance(parent, ast.Call) and node in parent.args:
            place = parent.args.index(node)
        if place is None or not isinstance(call, ast.Call):
            return False
        return _TAKES_FUNCTION.get(self._called(call) or "") == place

    def _is_decorator(self, node: ast.AST, parent: ast.AST) -> bool:
        """Whether it stands behind an ``@``, called or not: what it returns is a function."""
        if isinstance(parent, ast.Call) and parent.func is node:
            node, parent = parent, self._parents[parent]
        return isinstance(parent, ast.FunctionDef) and node in parent.decorator_list

    def _is_safe_text(self, node: ast.AST, parent: ast.AST) -> bool:
        """Next to sympy, which evaluates strings: none but harmless ones, or to be printed."""
        if isinstance(parent, ast.JoinedStr):
            return True
        if isinstance(parent, ast.Call) and self._called(parent) == "print" and node in parent.args:
            return True
        match node:
            case ast.Call():
                return self._called(node) not in _MAKES_TEXT
            case ast.Constant(value=str(text)):
                return isinstance(parent, ast.Expr) or _SAFE_TEXT.fullmatch(text) is not None
            case ast.Constant(value=value):
                return not isinstance(value, bytes)
        return isinstance(parent, ast.FormattedValue)  # part of an f-string
