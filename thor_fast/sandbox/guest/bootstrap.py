"""Runs inside a template: an interpreter started without ``site``, warmed, then forked.

    python -P -S -s -B bootstrap.py '{"core": ..., "paths": [...], "preload": [...], "jail": {...}, ...}'

Forked once per jail, and there once per snippet; only that last child runs what follows. Nothing of
thor_fast is imported here but the native core and this folder's guest files, from their paths: the
package itself is not on the snippet's path.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import io
import json
import linecache
import marshal
import os
import sys
import types
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    Report = Callable[[], object]

CONTROL_FD = 3
DIALOGUE_FD = 3
FILENAME = "main.py"
WORKDIR = "/tmp/work"  # noqa: S108  (in the jail's own tmpfs; csrc/core/mounts.h)
GUEST_PACKAGE = "_thor_guest"

# What modules asked to be called around a fork while they were imported; see _run_fork_hooks.
_fork_hooks: list[dict[str, Callable[[], object]]] = []
_register_at_fork = os.register_at_fork


def prepare() -> None:
    """In the child that will run a snippet, before it is known which."""
    _run_fork_hooks()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        # Without a seed of ours it would gather 2.5 KB of entropy, at seven times the price.
        numpy_random.seed(int.from_bytes(os.urandom(4), "little"))
    sympy_random = sys.modules.get("sympy.core.random")
    if sympy_random is not None:
        sympy_random.rng.seed()


def run(payload: bytes, report_out_of_memory: Report, has_dialogue: bool) -> int:
    """Run one snippet in this process, which is its own; returns the exit code."""
    # Each page that is first touched here is copied for this snippet: what can be skipped is.
    mode, code, files, env, determinism = marshal.loads(payload)  # noqa: S302  (from our owner)
    if env:
        os.environ.update(env)
    if files:
        _write_files(files)
    if determinism is not None:
        _guest_module("frozen").make_deterministic(*determinism)
    namespace = sys.modules["__main__"].__dict__

    def judge(error: BaseException | None) -> int:
        return _judge(error, report_out_of_memory)

    if has_dialogue:
        exit_code = _converse(mode, namespace, judge)
    else:
        exit_code = judge(_execute(code, namespace))
    return _finalise(exit_code)


def _execute(code: str, namespace: dict[str, Any]) -> BaseException | None:
    """Run a whole block; what it raised."""
    # What tracebacks, warnings and inspect show of the source.
    lines = io.StringIO(code, newline=None).readlines()
    linecache.cache[FILENAME] = (0, None, lines, FILENAME)
    report = _guest_module("report")
    try:
        compiled = compile(code, FILENAME, "exec", dont_inherit=True)
    except Exception as error:  # noqa: BLE001  (the snippet's result)
        return report.raised_by_compiler(error, lines)  # type: ignore[no-any-return]
    try:
        exec(compiled, namespace)  # noqa: S102
    except BaseException as error:  # noqa: BLE001  (likewise)
        return report.raised_by_block(error)  # type: ignore[no-any-return]
    return None


def _converse(
    mode: str, namespace: dict[str, Any], judge: Callable[[BaseException | None], int]
) -> int:
    dialogue = _guest_module("dialogue")
    talk = dialogue.Conversation(DIALOGUE_FD)
    if mode == "stream":
        return int(dialogue.serve_stream(talk, namespace, judge))

    def judge_block(error: BaseException | None) -> int:
        return _judge(error, lambda: None)  # the answer says so, of this block alone

    rewindable = mode == "rewindable session"
    return int(dialogue.serve_session(talk, namespace, judge_block, rewindable=rewindable))


def _judge(error: BaseException | None, report_out_of_memory: Report) -> int:
    """The exit code of what ended with ``error``, after printing what plain Python prints."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return _exit_code(error)
    if isinstance(error, MemoryError):
        report_out_of_memory()
    _print_exception(error)
    return 1


def _exit_code(stop: SystemExit) -> int:
    """As the interpreter itself maps ``SystemExit.code``."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _print_exception(error: BaseException) -> None:
    # It may have closed its stderr; plain Python has no more to say then either.
    with contextlib.suppress(OSError, ValueError):
        _guest_module("report").show_exception(error)


def _finalise(exit_code: int) -> int:
    """Do what matters of interpreter shutdown: join threads, run atexit, flush."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # noqa: SLF001
        if atexit._ncallbacks():  # noqa: SLF001
            atexit._run_exitfuncs()  # noqa: SLF001
    except SystemExit as stop:
        exit_code = _exit_code(stop)
    except BaseException as error:  # noqa: BLE001
        _print_exception(error)
        exit_code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            exit_code = exit_code or 120  # as the interpreter exits when it cannot flush
    return exit_code


def _write_files(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = os.path.join(WORKDIR, name)  # noqa: PTH118  (pathlib is not loaded)
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(content)


def _note_fork_hooks(**hooks: Callable[[], object]) -> None:
    _fork_hooks.append(hooks)


def _run_fork_hooks() -> None:
    """What a fork of Python's own would have run in the child, and those hooks for later forks.

    The zygote forks without them: as long as it has run nothing else they have nothing to repair
    but the random numbers, and threading's alone would cost as much as the fork.
    """
    os.register_at_fork = _register_at_fork
    for hooks in _fork_hooks:
        if "after_in_child" in hooks and hooks["after_in_child"].__module__ != "threading":
            hooks["after_in_child"]()
        _register_at_fork(**hooks)  # type: ignore[call-overload]


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
    loaded = sys.modules.get(f"{GUEST_PACKAGE}.{name}")
    if loaded is not None:
        return loaded
    if GUEST_PACKAGE not in sys.modules:
        package = types.ModuleType(GUEST_PACKAGE)
        package.__path__ = [os.path.dirname(__file__)]  # noqa: PTH120
        sys.modules[GUEST_PACKAGE] = package
    return importlib.import_module(f"{GUEST_PACKAGE}.{name}")


def _become_main() -> None:
    """Leave the interpreter as a script finds it."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=FILENAME, __builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    sys.argv = [FILENAME]
    sys.path.insert(0, WORKDIR)
    for stream in (sys.stdout, sys.stderr):
        # What was printed before a kill must have left the process.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def main(config: dict[str, Any]) -> NoReturn:
    """Warm up, then serve; never returns."""
    os.environ.pop("PYTHONHASHSEED", None)  # in effect by now, and not the snippet's business
    core = _load_core(config["core"])
    sys.path.extend(config["paths"])
    os.register_at_fork = _note_fork_hooks  # type: ignore[assignment]
    for name in config["preload"]:
        importlib.import_module(name)
    _guest_module("warm").run(config["routines"])
    for name in ("statements", "report", "dialogue"):
        _guest_module(name)
    if config["deterministic"]:
        _guest_module("frozen")
    _become_main()
    gc.collect()
    gc.freeze()  # the collector then never touches, and so never copies, the shared heap
    core.collapse_heap()
    core.serve_template(CONTROL_FD, config["jail"], prepare, run)
    raise SystemExit("serve_template returned")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
