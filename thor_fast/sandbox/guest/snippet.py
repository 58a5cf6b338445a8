"""What runs in a snippet's own process, and little else: the warm interpreter's fork.

Loaded from its file by ``bootstrap.py``: the standard library only. Each page that is first written
here is copied for this snippet, and to look at an object is to write its reference count: what can
be skipped is, and ``bootstrap.py`` loads this file last, so that its objects lie side by side.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from linecache import cache as source_lines
from marshal import loads
from typing import TYPE_CHECKING, Any

from . import dialogue, report

if TYPE_CHECKING:
    from collections.abc import Callable

DIALOGUE_FD = 3
FILENAME = "main.py"
WORKDIR = "/tmp/work"  # noqa: S108  (in the jail's own tmpfs; csrc/core/mounts.h)

_tell_out_of_memory: Callable[[], None]
_namespace: dict[str, Any]


def prepare(namespace: dict[str, Any], tell_out_of_memory: Callable[[], None]) -> None:
    """In the template: the namespace that blocks will run in, and how to say that memory is out."""
    global _namespace, _tell_out_of_memory
    _namespace, _tell_out_of_memory = namespace, tell_out_of_memory
    # What tracebacks, warnings and inspect show of the source.
    source_lines[FILENAME] = (0, None, _lines, FILENAME)  # type: ignore[assignment]


def run(payload: bytes, has_dialogue: bool) -> int:
    """Run one snippet in this process, which is its own; returns the exit code."""
    mode, code, files, env, determinism = loads(payload)  # noqa: S302  (from our owner)
    if env:
        os.environ.update(env)
    if files:
        _write_files(files)
    if determinism is not None:
        from . import frozen

        frozen.make_deterministic(*determinism)
    if has_dialogue:
        return _finalise(_converse(mode))
    error = _execute(code)
    return _finalise(0 if error is None else _judge(error))


def _execute(code: str) -> BaseException | None:
    """Run a whole block; what it raised."""
    _lines.text = code
    try:
        compiled = compile(code, FILENAME, "exec", 0, True)
    except Exception as error:  # noqa: BLE001  (the snippet's result)
        return report.raised_by_compiler(error, _lines)
    try:
        exec(compiled, _namespace)  # noqa: S102
    except BaseException as error:  # noqa: BLE001  (likewise)
        return report.raised_by_block(error)
    return None


def _converse(mode: str) -> int:
    talk = dialogue.Conversation(DIALOGUE_FD)
    if mode == "stream":
        return dialogue.serve_stream(talk, _namespace, _judge)
    serve = dialogue.serve_session if mode == "session" else dialogue.serve_states
    return serve(talk, _namespace, _print_and_rate)


def _judge(error: BaseException | None) -> int:
    """As :func:`_print_and_rate`; tells our owner of a lack of memory."""
    if isinstance(error, MemoryError):
        _tell_out_of_memory()
    return _print_and_rate(error)


def _print_and_rate(error: BaseException | None) -> int:
    """The exit code of what ended with ``error``, after printing what plain Python prints."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return _exit_code(error)
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
        report.show_exception(error)


def _finalise(exit_code: int) -> int:
    """Do what matters of interpreter shutdown: join threads, run atexit, flush."""
    # Most snippets have neither threads nor callbacks, and to find out costs less than to end both.
    if atexit._ncallbacks() or len(sys._current_frames()) > 1:  # noqa: SLF001
        try:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()  # noqa: SLF001
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


class _Lines:
    """A block's lines, split when somebody looks: most blocks end without a traceback."""

    __slots__ = ("_split_lines", "text")

    def __init__(self) -> None:
        self.text = ""
        self._split_lines: list[str] | None = None

    def _split(self) -> list[str]:
        if self._split_lines is None:
            # As of a file; ``str.splitlines`` also splits at form feeds and others.
            self._split_lines = io.StringIO(self.text, newline=None).readlines()
        return self._split_lines

    def __len__(self) -> int:
        return len(self._split())

    def __getitem__(self, index: Any) -> Any:
        return self._split()[index]


_lines = _Lines()
