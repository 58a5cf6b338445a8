"""Tiers of warm templates, and which of them a snippet's imports ask for.

What a template has loaded is what every fork of it pays for (0.4 ms bare, 2.5 ms with all of
science), and what it lacks a snippet imports itself (0.3 s for sympy, 0.5 s for scipy.stats). Any
tier runs any snippet: a wrong choice costs time, never a result.
"""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tier", "choose_tier", "default_tiers", "imported_packages"]


@dataclass(frozen=True)
class Tier:
    """What one template is warmed with."""

    name: str
    modules: tuple[str, ...]
    """Imported by the template, in this order."""
    routines: tuple[str, ...]
    """Names of warm-up routines of ``guest/warm.py``, run after the imports."""

    @cached_property
    def packages(self) -> frozenset[str]:
        """Top-level names of ``modules``."""
        return frozenset(module.partition(".")[0] for module in self.modules)


# What short numeric snippets import; a fork costs no more with it (0.37 ms) than with half of it.
# Not threading nor what imports it (logging, queue, concurrent): its hook adds 0.3 ms to each fork.
_STDLIB = (
    *("abc", "bisect", "calendar", "cmath", "collections", "contextlib", "copy"),
    *("dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq", "io"),
    *("itertools", "json", "math", "numbers", "operator", "os", "pprint", "random", "re"),
    *("statistics", "string", "sys", "textwrap", "time", "traceback", "types", "typing"),
    "warnings",
)


@dataclass(frozen=True)
class _Package:
    modules: tuple[str, ...]
    routines: tuple[str, ...]


_PACKAGES = {
    "numpy": _Package(
        ("numpy", "numpy.fft", "numpy.linalg", "numpy.polynomial", "numpy.random"), ("numpy",)
    ),
    "mpmath": _Package(("mpmath",), ("mpmath",)),
    "sympy": _Package(
        ("sympy",),
        (
            *("sympy_core", "sympy_algebra", "sympy_solve", "sympy_calculus", "sympy_matrices"),
            *("sympy_discrete", "sympy_geometry", "sympy_stats"),
        ),
    ),
    "scipy": _Package(
        (
            *("scipy", "scipy.fft", "scipy.integrate", "scipy.interpolate", "scipy.linalg"),
            *("scipy.optimize", "scipy.signal", "scipy.sparse", "scipy.sparse.linalg"),
            *("scipy.spatial", "scipy.special", "scipy.stats"),
        ),
        ("scipy", "scipy_stats"),
    ),
    "pandas": _Package(("pandas",), ("pandas",)),
}

# Pandas apart: it would add 0.4 ms and 35 MB to every fork of science. Last, so that a snippet
# with both pandas and scipy, which no tier holds, goes where more is loaded.
_TIERS = (
    ("bare", ()),
    ("numpy", ("numpy",)),
    ("science", ("numpy", "mpmath", "sympy", "scipy")),
    ("pandas", ("numpy", "pandas")),
)


def default_tiers() -> tuple[Tier, ...]:
    """The tiers this interpreter's packages allow; the first is always ``bare``.

    A package that is not installed is left out, and with it a tier that has none of its own left.
    """
    installed = {package for package in _PACKAGES if _is_installed(package)}
    tiers: list[Tier] = []
    for name, wanted in _TIERS:
        found = [_PACKAGES[package] for package in wanted if package in installed]
        modules = [module for package in found for module in package.modules]
        routines = [routine for package in found for routine in package.routines]
        tier = Tier(name, (*_STDLIB, *modules), ("language", "tracebacks", "stdlib", *routines))
        if all(tier.packages != other.packages for other in tiers):
            tiers.append(tier)
    return tuple(tiers)


def _is_installed(package: str) -> bool:
    # The template runs without site and its .pth files: what only they add, it cannot import.
    paths = sysconfig.get_paths()
    return PathFinder.find_spec(package, [paths["purelib"], paths["platlib"]]) is not None


# Two patterns that begin with a literal, which the regex engine searches for at memory speed: 2 us
# for 20 lines, where one pattern for whole statements takes 20 us. Neither can backtrack far.
_FROM = re.compile(r"from[ \t]+([\w.]+)[ \t]+import\b")
_IMPORT = re.compile(r"import(?:[ \t]+([^\n;#]+)|(?:_module|__)[ \t]*\([ \t]*['\"]([\w.]+))")


def imported_packages(code: str) -> set[str]:
    """Top-level names that ``code`` seems to import, found by text: strings and comments count."""
    modules = []
    used = set()
    for match in _FROM.finditer(code):
        modules.append(match[1])
        used.add(match.end())
    for match in _IMPORT.finditer(code):
        names, called = match.groups()
        if called:
            modules.append(called)
        elif match.start() + len("import") not in used:
            modules += (name.split(maxsplit=1)[0] for name in names.split(",") if name.strip())
    roots = {module.partition(".")[0] for module in modules}
    return {root for root in roots if root.isidentifier()}


def choose_tier(code: str, tiers: Sequence[Tier]) -> int:
    """Index in ``tiers`` of the first that holds most of what ``code`` imports.

    Never raises, whatever the text; takes a few microseconds for a typical snippet.
    """
    packages = imported_packages(code)
    held = [len(packages & tier.packages) for tier in tiers]
    return held.index(max(held))
