"""The warm-up: complete, silent, and without a trace that a snippet could see."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from thor_fast.sandbox import tiers as tiers_module
from thor_fast.sandbox.tiers import default_tiers

if TYPE_CHECKING:
    from types import ModuleType

WARM = Path(tiers_module.__file__).with_name("guest") / "warm.py"
TIERS = {tier.name: tier for tier in default_tiers()}

# Does what a template does, and prints what could have been left behind.
TEMPLATE = """
import importlib, importlib.util, json, os, sys

path, modules, routines, snippets = json.loads(sys.argv[1])
for name in modules:
    importlib.import_module(name)
import decimal, linecache, warnings

def state():
    found = {
        "files": sorted(os.listdir("/proc/self/fd")),
        "tasks": len(os.listdir("/proc/self/task")),
        "filters": [str(entry) for entry in warnings.filters],
        "warned": sorted(
            (name, str(key)) for name, module in list(sys.modules.items())
            for key in getattr(module, "__warningregistry__", ()) if key != "version"
        ),
        "decimal": str(decimal.getcontext()),
        "recursion": sys.getrecursionlimit(),
        "stdout": sys.stdout is sys.__stdout__,
        # Python 3.13 keeps the text of -c there, which is our own.
        "lines": [name for name in linecache.cache if name[0] == "<" and name != "<string>"],
        "environment": dict(os.environ),
        "directory": os.getcwd(),
    }
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        found["numpy"] = [str(numpy.get_printoptions()), str(numpy.geterr())]
    if "mpmath" in sys.modules:
        found["mpmath"] = [sys.modules["mpmath"].mp.dps, sys.modules["mpmath"].iv.dps]
    return found

before = state()
spec = importlib.util.spec_from_file_location("_warm", path)
warm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(warm)
stumbles = warm.run(routines)
after = state()
loaded = set(sys.modules)
out, sys.stdout = sys.stdout, open(os.devnull, "w")
cached = {}
if "sympy" in loaded:
    from sympy.core.cache import CACHE
    cached = {each.__qualname__: each.cache_info().currsize for each in CACHE}
    cached = {name: size for name, size in cached.items() if size}
    from sympy import Symbol, lambdify
    cached["lambdify"] = lambdify(Symbol("x"), 1).__code__.co_filename
for snippet in snippets:
    exec(compile(snippet, "main.py", "exec"), {"__name__": "__main__"})
new = sorted(set(sys.modules) - loaded)
print(json.dumps([before, after, stumbles, cached, new, sorted(loaded)]), file=out)
"""

SYMPY = "from sympy import *; x = symbols('x'); f = Function('f')\n"
SNIPPETS = {
    "bare": [
        "print([1], 1.5, f'{3:>4}')",
        "try: compile('1 +', 'm', 'exec')\nexcept SyntaxError: 0",
    ],
    "numpy": [
        "import numpy as np\nprint(np.random.rand(2), np.linalg.eig(np.eye(2)), np.fft.fft([1]))"
    ],
    "science": [
        SYMPY + "print(solve(x**2 - 3*x + 2), factor(x**4 - 1), simplify(sin(x)**2 + cos(x)**2))",
        SYMPY + "print(integrate(exp(-x)*x, (x, 0, oo)), series(cos(x)), limit(sin(x)/x, x, 0))",
        SYMPY + "print(latex(x**2 / 3), pretty(x), dsolve(f(x).diff(x) - f(x)), lambdify(x, x)(2))",
        SYMPY + "print(Matrix([[1, 2], [3, 4]]).eigenvals(), factorint(360), pi.n(20), x.is_real)",
        "from sympy.stats import Die, E\nprint(E(Die('X', 6)))\nfrom sympy.geometry import *",
        "from scipy.optimize import minimize\nprint(minimize(lambda v: (v[0] - 1) ** 2, [0.0]).x)",
        "from scipy import stats, integrate\nprint(stats.norm.cdf(1), integrate.quad(abs, 0, 1))",
    ],
    "pandas": ["import pandas as pd\nprint(pd.DataFrame({'a': [1, 2]}).describe())"],
}


def load_warm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_warm", WARM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=sorted(TIERS))
def warmed(request: pytest.FixtureRequest) -> Any:
    """What the template of one tier reports, and its own output."""
    tier = TIERS[request.param]
    config = json.dumps([str(WARM), tier.modules, tier.routines, SNIPPETS[tier.name]])
    done = subprocess.run(
        [sys.executable, "-P", "-c", TEMPLATE, config],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_no_statement_stumbles(warmed: Any) -> None:
    assert warmed[2] == []


def test_one_thread_and_no_state_is_left(warmed: Any) -> None:
    before, after = warmed[:2]
    assert after == before
    assert after["tasks"] == 1
    assert after["lines"] == []


def test_results_of_sympy_are_forgotten(warmed: Any) -> None:
    cached = dict(warmed[3])
    assert cached.pop("lambdify", "<lambdifygenerated-1>") == "<lambdifygenerated-1>"
    # One entry is what a table without arguments has; a function of anything would have many.
    assert set(cached.values()) <= {1}, cached


def test_warm_snippets_import_nothing_more(warmed: Any) -> None:
    assert warmed[4] == []


def test_template_holds_nothing_of_ours(warmed: Any) -> None:
    assert not [name for name in warmed[5] if name.startswith("thor_fast")]


def test_every_routine_is_of_some_tier() -> None:
    warm = load_warm()
    listed = {routine for tier in TIERS.values() for routine in tier.routines}
    assert listed <= set(warm.ROUTINES)
    if {"science", "pandas"} <= set(TIERS):
        assert listed == set(warm.ROUTINES)


def test_statement_that_raises_is_noted_and_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    warm = load_warm()
    seen: list[int] = []
    sys.modules["warm_seen"] = seen  # type: ignore[assignment]
    warm.ROUTINES["broken"] = (
        "import sys\nprint('never shown')\nmissing.name\nsys.modules['warm_seen'].append(3)"
    )
    try:
        stumbles = warm.run(["broken", "tracebacks"])
    finally:
        del sys.modules["warm_seen"]
    assert stumbles == ["broken:3: NameError: name 'missing' is not defined"]
    assert seen == [3]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"warm-up skipped {stumbles[0]}\n"


def test_unknown_routine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"routines \['warmth'\], expected some of \['language'"):
        load_warm().run(["language", "warmth"])
