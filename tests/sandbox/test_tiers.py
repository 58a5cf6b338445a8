"""Which tier a snippet's text asks for, against the compiler's own view of its imports."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.sandbox import tiers as tiers_module
from thor_fast.sandbox.tiers import (
    Tier,
    choose_tier,
    default_tiers,
    imported_packages,
)

TIERS = (
    Tier("bare", ("math", "json"), ()),
    Tier("numpy", ("math", "json", "numpy", "numpy.linalg"), ()),
    Tier("science", ("math", "json", "numpy", "sympy", "scipy.stats"), ()),
    Tier("pandas", ("math", "json", "numpy", "pandas"), ()),
)
PACKAGES = ("math", "json", "numpy", "sympy", "scipy", "pandas", "networkx", "os")


def chosen(code: str) -> str:
    return TIERS[choose_tier(code, TIERS)].name


# --- the tiers -----------------------------------------------------------------------------------


def test_default_tiers_grow_from_bare() -> None:
    tiers = default_tiers()
    assert tiers[0].name == "bare"
    assert all(tiers[0].packages < tier.packages for tier in tiers[1:])
    assert len({tier.name for tier in tiers}) == len(tiers)


def test_default_tiers_import_nothing() -> None:
    code = """
import sys
from thor_fast.sandbox.tiers import default_tiers
assert default_tiers()
print(sorted({"sympy", "scipy", "pandas", "mpmath"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("missing", "names", "gone"),
    [
        ({"numpy", "mpmath", "sympy", "scipy", "pandas"}, ["bare"], "numpy"),
        ({"mpmath", "sympy", "scipy", "pandas"}, ["bare", "numpy"], "sympy"),
        ({"pandas"}, ["bare", "numpy", "science"], "pandas"),
        ({"scipy"}, ["bare", "numpy", "science", "pandas"], "scipy"),
    ],
)
def test_missing_packages_are_left_out(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], names: list[str], gone: str
) -> None:
    monkeypatch.setattr(tiers_module, "_is_installed", lambda package: package not in missing)
    tiers = default_tiers()
    assert [tier.name for tier in tiers] == names
    for tier in tiers:
        assert gone not in tier.packages
        assert not any(routine.startswith(gone) for routine in tier.routines)


def test_installed_is_what_a_template_without_site_finds() -> None:
    assert tiers_module._is_installed("numpy")
    assert not tiers_module._is_installed("warm_missing_package")
    assert not tiers_module._is_installed("json")


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "tier"),
    [
        ("", "bare"),
        ("print(1 + 1)", "bare"),
        ("import math, json", "bare"),
        ("import networkx", "bare"),
        ("import numpy as np, sympy", "science"),
        ("import numpy as np, math", "numpy"),
        ("from numpy.linalg import det", "numpy"),
        ("from scipy.optimize import brentq", "science"),
        ("from sympy import*", "science"),
        ("from sympy import (symbols,\n    solve)", "science"),
        ("def f():\n    try:\n\timport sympy\n    except ImportError: pass", "science"),
        ("np = __import__('numpy')", "numpy"),
        ('import importlib\nsp = importlib.import_module( "sympy.core" )', "science"),
        ("from importlib import import_module\nimport_module('pandas')", "pandas"),
        ("x = 1; import numpy; y = 2", "numpy"),
        ("if True: from sympy import pi", "science"),
        ("import\tnumpy\r\n", "numpy"),
        ("import math # not numpy", "bare"),
        ("import numpy; import sympy", "science"),
        ("import numpy\nimport pandas", "pandas"),
        ("from pandas import DataFrame\nimport scipy.stats", "science"),
        ("important = numpy = 1", "bare"),
        ("from . import numpy", "bare"),
        ("from json import numpy, sympy", "bare"),
        ("from json import loads; import sympy", "science"),
        ("import \\\n", "bare"),
        ("import numpy\0", "bare"),
        ("import \ud800numpy\nimport numpy", "numpy"),
    ],
)
def test_choice(code: str, tier: str) -> None:
    assert chosen(code) == tier


@given(st.sets(st.sampled_from(PACKAGES)))
def test_choice_is_the_first_that_holds_most(wanted: set[str]) -> None:
    index = choose_tier("\n".join(f"import {package}" for package in sorted(wanted)), TIERS)
    held = [len(wanted & tier.packages) for tier in TIERS]
    assert held[index] == max(held)
    assert max(held[:index], default=-1) < held[index]


@given(st.text(st.characters(exclude_categories=())), st.text(st.characters(exclude_categories=())))
def test_any_text_gets_a_tier(before: str, after: str) -> None:
    assert choose_tier(before + after, TIERS) in range(len(TIERS))
    # Nothing that precedes a statement on lines of its own can hide it.
    assert "sympy" in imported_packages(f"{before}\nimport sympy\n{after}")


names = st.sampled_from(PACKAGES)
dotted = st.tuples(names, st.sampled_from(["", ".sub", ".sub.deeper"])).map("".join)
aliased = st.tuples(dotted, st.sampled_from(["", " as alias"])).map("".join)
statement = st.one_of(
    st.lists(aliased, min_size=1, max_size=3).map(lambda parts: "import " + ", ".join(parts)),
    st.tuples(dotted, names).map(lambda pair: f"from {pair[0]} import {pair[1]} as alias, other"),
    dotted.map(lambda name: f"from {name} import (one,\n two)"),
    st.sampled_from(["x = 1", "imports = [x for x in y]", "pass  # comment", "x.from_imports()"]),
)
block = st.tuples(
    st.sampled_from(["{}", "if x: {}", "def f(): {}", "x = 1; {}", "try: {}\nfinally: pass"]),
    statement,
).map(lambda pair: pair[0].format(pair[1]))


@given(st.lists(block, max_size=6).map("\n".join))
def test_scan_agrees_with_the_parser(code: str) -> None:
    expected = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            expected |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            expected.add(node.module.partition(".")[0])
    assert imported_packages(code) == expected


@pytest.mark.parametrize(
    "text",
    ["x = 1\n", " ", ";", "import ", "from ", "from a ", "a.", "import(", "__import__('", "\0"],
)
def test_five_megabytes_of_anything(text: str) -> None:
    code = text * (5_000_000 // len(text))
    assert chosen(code) == "bare"
    assert chosen(f"{code}\nimport sympy") == "science"
