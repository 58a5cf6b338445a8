"""Runs inside a template: an interpreter started without ``site``, warmed, then forked.

    python -P -S -s -B bootstrap.py '{"core": ..., "preload": [...], "jail": {...}, ...}'

Forked once per jail, and there once per snippet; only that last child runs what follows. Nothing of
thor_fast is imported here but the native core and this folder's guest files, from their paths: the
package itself is not on the snippet's path.
"""

from __future__ import annotations

import _random
import builtins
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL_FD = 3
GUEST_PACKAGE = "_thor_guest"


def reseeding() -> Callable[[int], object]:
    """What the zygote calls with 64 random bits before each fork, whose random numbers they start.

    There, because what the zygote writes costs it no copy. Python's at-fork hooks, which would do
    it for the ``random`` module, are not run: in a process with one thread they have nothing else
    to repair, and cost as much as the fork. Without a seed of ours each generator would gather
    2.5 KB of entropy, at many times the price.
    """
    import random  # after the tier's modules, of which it may be one

    random._inst.gauss_next = None  # type: ignore[attr-defined]  # noqa: SLF001
    # Past the method written in Python, whose run would touch 40 pages of the zygote's.
    seed_python = functools.partial(_random.Random.seed, random._inst)  # noqa: SLF001
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is None:
        return seed_python
    sympy_random = sys.modules.get("sympy.core.random")

    def reseed(seed: int) -> None:
        seed_python(seed)
        numpy_random.seed(seed & 0xFFFFFFFF)
        if sympy_random is not None:
            sympy_random.rng.seed(seed + 1)  # the same would repeat what ``random`` gives

    return reseed


def _load_core(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_core", path)
    spec = importlib.util.spec_from_loader("_core", loader)
    if spec is None:
        raise ImportError(f"no module spec for {path}")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _guest_module(name: str) -> Any:
    """A file next to this one, as a module of a package of its own."""
    if GUEST_PACKAGE not in sys.modules:
        package = types.ModuleType(GUEST_PACKAGE)
        package.__path__ = [os.path.dirname(__file__)]  # noqa: PTH120
        sys.modules[GUEST_PACKAGE] = package
    return importlib.import_module(f"{GUEST_PACKAGE}.{name}")


def _become_main(filename: str, workdir: str) -> dict[str, Any]:
    """Leave the interpreter as a script finds it; gives the script's namespace."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=filename, __builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    sys.argv = [filename]
    sys.path.insert(0, workdir)
    return main.__dict__


def main(config: dict[str, Any]) -> NoReturn:
    """Warm up, then serve; never returns."""
    for name in ("LD_BIND_NOW", "PYTHONHASHSEED"):  # in effect by now, not the snippet's business
        os.environ.pop(name, None)
    core = _load_core(config["core"])
    core.use_own_arenas()
    core.pace_standard_output()  # before a module can have kept the other
    sys.path.extend(config["paths"])
    for name in config["preload"]:
        importlib.import_module(name)
    _guest_module("warm").run(config["routines"])
    for name in ("statements", "report", "dialogue"):
        _guest_module(name)
    if config["deterministic"]:
        _guest_module("frozen")
    gc.collect()
    core.fill_free_memory()
    filler = _guest_module("pools").fill()
    # From here on, what is made lies side by side, and next to what a snippet will make.
    snippet = _guest_module("snippet")
    namespace = _become_main(snippet.FILENAME, snippet.WORKDIR)
    snippet.prepare(namespace, core.report_out_of_memory)
    gc.collect()  # empties the interpreter's lists of objects to use again
    core.fill_free_memory()
    filler += _guest_module("pools").fill()
    gc.freeze()  # the collector then never touches, and so never copies, the shared heap
    core.lay_out_memory()
    core.serve_template(CONTROL_FD, config["jail"], reseeding(), snippet.run)
    raise SystemExit(f"serve_template returned; {len(filler)} filling objects")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
