"""Several blocks of Python in one namespace, as the cells of a notebook.

Loaded from its file inside the guest interpreter: the standard library only.

- What a block defined, imported or changed, the next one finds, also after an exception: the
  namespace stays as it was at that point.
- Tracebacks name the first block ``main.py``, the n-th ``block<n>.py``, and show the lines of the
  block in which the failing function was defined.
- ``from __future__`` imports stay in effect. A block's docstring becomes ``__doc__``. Values of
  expressions are not shown.
- A block that does not compile leaves the namespace alone.
- ``SystemExit`` is the end of the session, which is for the caller to see in ``Ending.error``.
"""

from __future__ import annotations

from typing import Any

from .statements import Statements


class Session:
    """Opens one block after another on a namespace; each is finished before the next is opened."""

    def __init__(self, namespace: dict[str, Any]):
        self._namespace = namespace
        self._count = 0
        self._last: Statements | None = None

    def open(self) -> Statements:
        """The next block. Run whole, it is ``session.open().finish(text)``.

        A block that was fed in pieces and ends as ``DISCARD`` or ``RERUN`` has changed the
        namespace: undoing that takes a copy of the process from before the block.
        """
        self._count += 1
        filename = "main.py" if self._count == 1 else f"block{self._count}.py"
        # It remembers the warnings already shown by line number only.
        self._namespace.pop("__warningregistry__", None)
        flags = self._last.flags if self._last is not None else 0
        self._last = Statements(self._namespace, filename, flags)
        return self._last
