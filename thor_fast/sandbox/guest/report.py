"""Shows an uncaught exception with the text of plain Python, byte for byte.

Loaded from its file inside the guest interpreter: the standard library only.

The ``traceback`` module differs from what the interpreter itself prints before 3.13 (no "Did you
mean", other carets below syntax errors), and the interpreter looks for source lines in files,
where a block has none. So the interpreter prints, and finds the lines of ``linecache``.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Lines(Protocol):
        """A block's source, as far as it is looked at here."""

        def __getitem__(self, span: slice, /) -> list[str]: ...


def show_exception(error: BaseException) -> None:
    """Print ``error`` to ``sys.stderr``, or do what the block has put in ``sys.excepthook``."""
    with _source_files() if sys.version_info < (3, 13) else contextlib.nullcontext():
        sys.excepthook(type(error), error, error.__traceback__)


def raised_by_block(error: BaseException) -> BaseException:
    """Without the frame that ran the block."""
    trace = error.__traceback__
    return error.with_traceback(trace.tb_next if trace is not None else None)


def raised_by_compiler(error: BaseException, lines: Lines) -> BaseException:
    """Without our frames, and with what would have been found in a file ``main.py``."""
    if isinstance(error, SyntaxError) and error.lineno:
        error.text = "".join(lines[error.lineno - 1 : error.lineno]) or error.text
    return error.with_traceback(None)


class _Source(io.BytesIO):
    """Source lines as a file whose descriptor is empty.

    The interpreter reads lines from the object, and looks at the descriptor only for an encoding.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._empty = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._empty

    def close(self) -> None:
        if not self.closed:
            os.close(self._empty)
        super().close()


@contextlib.contextmanager
def _source_files() -> Iterator[None]:
    """Let ``io.open``, which the interpreter calls for source lines, find those of blocks."""
    real: Any = io.open

    def open_source(file: Any, *args: Any, **kwargs: Any) -> Any:
        lines = linecache.getlines(file) if isinstance(file, str) else []
        if not lines:
            return real(file, *args, **kwargs)
        return _Source("".join(lines).encode(errors="replace"))

    module: Any = io
    module.open = open_source
    try:
        yield
    finally:
        module.open = real
