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


def show_exception(error: BaseException) -> None:
    """Print ``error`` to ``sys.stderr``, or do what the block has put in ``sys.excepthook``."""
    with _source_files() if sys.version_info < (3, 13) else contextlib.nullcontext():
        sys.excepthook(type(error), error, error.__traceback__)


@contextlib.contextmanager
def _source_files() -> Iterator[None]:
    """Let ``io.open``, which the interpreter calls for source lines, find those of blocks."""
    real: Any = io.open

    def open_source(file: Any, *args: Any, **kwargs: Any) -> Any:
        lines = linecache.getlines(file) if isinstance(file, str) else []
        if not lines:
            return real(file, *args, **kwargs)
        content = "".join(lines).encode(errors="replace")
        # The interpreter takes the descriptor from the file object.
        memory = os.fdopen(os.memfd_create(file), "w+b", closefd=True)
        memory.write(content)
        memory.seek(0)
        return memory

    module: Any = io
    module.open = open_source
    try:
        yield
    finally:
        module.open = real
