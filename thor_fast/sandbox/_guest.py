"""Runs inside the zygote: an interpreter started with ``-I -S``, warmed, then forked per snippet.

    python -I -S _guest.py '{"core": ..., "paths": [...], "readonly": [...], "preload": [...]}'

Only the standard library is imported here, and nothing of thor_fast but the native core, loaded
from its file: the package's own directory is not on the snippet's path.
"""

from __future__ import annotations

import atexit
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
import threading
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    Report = Callable[[], object]

CONTROL_FD = 3
FILENAME = "main.py"
WORKDIR = "/tmp/work"  # noqa: S108  (in the snippet's own tmpfs; csrc/core/child_setup.cc)


def run(payload: bytes, report_out_of_memory: Report) -> int:
    """Run one snippet in this process, which is its own; returns the exit code."""
    code, files, env = marshal.loads(payload)  # noqa: S302  (written by our own parent)
    os.environ.update(env)
    _write_files(files)
    _reseed()
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = FILENAME
    sys.modules["__main__"] = module
    sys.argv = [FILENAME]
    sys.path.insert(0, WORKDIR)
    exit_code = _execute(code, module, report_out_of_memory)
    return _finalise(exit_code)


def _execute(
    code: str, module: types.ModuleType, report_out_of_memory: Callable[[], object]
) -> int:
    try:
        lines = code.splitlines(keepends=True)
        linecache.cache[FILENAME] = (len(code), None, lines, FILENAME)
        exec(compile(code, FILENAME, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    except SystemExit as stop:
        return _exit_code(stop)
    except BaseException as error:  # noqa: BLE001  (whatever the snippet raised is its result)
        if isinstance(error, MemoryError):
            report_out_of_memory()
        _print_exception(error)
        return 1
    return 0


def _exit_code(stop: SystemExit) -> int:
    """As the interpreter itself maps ``SystemExit.code``."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _print_exception(error: BaseException) -> None:
    """Print what plain Python would, without the frames of this file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    if sys.excepthook is sys.__excepthook__:
        # The C hook looks for the file; the snippet is only in linecache.
        traceback.print_exception(error)
    else:
        sys.excepthook(type(error), error, trace)


def _finalise(exit_code: int) -> int:
    """Do what matters of interpreter shutdown: join threads, run atexit, flush."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
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
        path = Path(WORKDIR, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _reseed() -> None:
    """Give this child random numbers of its own; the ``random`` module does so by itself."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _warm_up() -> None:
    """Build what the first compile, traceback and print build lazily, once for all children."""
    for source in ("x = [i ** 2 for i in range(3)]\nprint(f'{x}', end='')", "1 +", "1 / 0"):
        try:
            with open(os.devnull, "w", encoding="utf-8") as sink:  # noqa: PTH123
                stdout, sys.stdout = sys.stdout, sink
                exec(compile(source, FILENAME, "exec"), {})  # noqa: S102
        except Exception as error:  # noqa: BLE001
            traceback.print_exception(error, file=io.StringIO())
        finally:
            sys.stdout = stdout


def _load_core(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_core", path)
    spec = importlib.util.spec_from_loader("_core", loader)
    if spec is None:
        raise ImportError(f"no module spec for {path}")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main(config: dict[str, Any]) -> NoReturn:
    """Warm up, then serve; never returns."""
    core = _load_core(config["core"])
    sys.path.extend(config["paths"])
    for name in config["preload"]:
        importlib.import_module(name)
    for stream in (sys.stdout, sys.stderr):
        # What was printed before a kill must have left the process.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    _warm_up()
    gc.collect()
    gc.freeze()  # the collector then never touches, and so never copies, the shared heap
    core.serve_zygote(CONTROL_FD, config["readonly"], run)
    raise SystemExit("serve_zygote returned")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
