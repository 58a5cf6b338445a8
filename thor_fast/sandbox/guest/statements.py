"""Runs a block of Python whose text arrives in pieces: each statement as soon as it is complete.

Loaded from its file inside the guest interpreter: the standard library only.

    statements = Statements(module.__dict__, "main.py")
    for piece in pieces:
        statements.feed(piece)         # runs what has become complete
    ending = statements.finish()       # runs the rest

The result is that of running the whole block at once, or else ``ending.outcome`` says that it is
not. ``Statements(...).finish(text)`` *is* running the whole block at once, from the same depth of
the stack.

Why cutting is exact: a text of whole lines that compiles by itself, and that is followed by the
start of a line with a token that cannot continue a compound statement, is a prefix of the
statements of the whole; ``Splitter`` only guesses where that is worth trying. What still depends
on the whole is checked when the whole is known (``finish`` compiles it) or is carried over from
statement to statement: ``from __future__``, one object for equal constants, line numbers.
"""

from __future__ import annotations
import __future__

import builtins
import enum
import io
import linecache
import operator
import os
import re
import sys
import types
import warnings
from typing import Any, NamedTuple

from .report import raised_by_block, raised_by_compiler
from .splitter import Splitter

# What shows how the module's code is run, the text that is not there yet, or the time that passes
# while waiting for it. A block with one of these words in it is run as a whole.
_REVEALING = re.compile(
    r"\b(?:_current_frames|_getframe|addaudithook|alarm|currentframe|extract_stack|f_back|faulthandler"
    r"|format_stack|getallocatedblocks|getrefcount|inspect|linecache|print_stack|setitimer"
    r"|stack_info|stacklevel|tracemalloc)\b"
)
_FUTURE_FLAGS = 0
for _name in __future__.all_feature_names:
    if _name != "barry_as_FLUFL":  # acts on the parser, so not from inside a text
        _FUTURE_FLAGS |= getattr(__future__, _name).compiler_flag


class Outcome(enum.Enum):
    """What a finished block amounts to."""

    DONE = "done"  # the result is that of the whole block
    DISCARD = "discard"  # the block does not compile: undo what ran, show the error
    RERUN = "rerun"  # what ran cannot be made equal: undo it, run the whole block


class Ending(NamedTuple):
    """How a block ended; ``error`` is what it raised, its traceback without our frames."""

    outcome: Outcome
    error: BaseException | None = None


class Statements:
    """One block: ``feed`` its text in pieces, then ``finish``.

    Statements run inside ``feed``. The first exception, ``SystemExit`` included, is kept for
    ``finish``, since the block may still turn out not to compile; nothing runs after it.
    A process that the block forks and that comes back here ends.
    """

    def __init__(self, namespace: dict[str, Any], filename: str = "main.py", flags: int = 0):
        """Run in ``namespace``; ``flags``: those of ``from __future__`` in effect at the start."""
        self.flags = flags
        self._namespace = namespace
        self._builtins = namespace.setdefault("__builtins__", builtins)
        namespace.setdefault("__annotations__", {})  # as in every __main__
        self._filename = filename
        self._lines: list[str] = []
        linecache.cache[filename] = (0, None, self._lines, filename)  # None: never read again
        self._pieces: list[str] = []
        self._newlines = io.IncrementalNewlineDecoder(None, translate=True)
        self._splitter = Splitter()
        self._eager = True
        self._ran = 0  # characters
        self._exact = True
        self._error: BaseException | None = None
        self._constants: dict[Any, Any] = {}
        self._pid = os.getpid()
        self._compiler = _Compiler()
        self._watchers = _watchers()

    def feed(self, piece: str) -> bool:
        """Take more text, run what is complete; False: nothing more will run before ``finish``."""
        code = self._next_code(piece)
        if code is not None:
            try:
                exec(code, self._namespace)  # noqa: S102
            except BaseException as error:  # noqa: BLE001  (the block's result)
                self._error = raised_by_block(error)
                self._eager = False
            if os.getpid() != self._pid:
                os._exit(0)  # the whole block will be run anew, forks and all
        return self._eager

    def finish(self, rest: str = "") -> Ending:
        """Take the last of the text and run what has not run; call once."""
        code, ending = self._last_code(rest)
        if code is not None:
            try:
                exec(code, self._namespace)  # noqa: S102
            except BaseException as error:  # noqa: BLE001  (the block's result)
                return Ending(Outcome.DONE, raised_by_block(error))
        return ending

    def _next_code(self, piece: str) -> types.CodeType | None:
        text = self._newlines.decode(piece)
        self._pieces.append(text)
        code = None
        if self._eager:
            try:
                ready = self._splitter.feed(text)
                code = self._compile_part(ready) if ready else None
                self._eager = code is not None or not ready
            except BaseException:  # noqa: BLE001  (no memory, or the block's signal handler)
                self._eager = self._exact = False
        return code

    def _last_code(self, rest: str) -> tuple[types.CodeType | None, Ending]:
        self._pieces.append(self._newlines.decode(rest, final=True))
        text = "".join(self._pieces)
        if not self._ran:
            return self._compile_alone(text)
        try:
            self._compiler.compile(text, self._filename, self.flags)
        except (SyntaxError, ValueError) as error:
            if self._compiler.warned:  # they would have to be shown before the error
                return None, Ending(Outcome.RERUN)
            return None, Ending(Outcome.DISCARD, raised_by_compiler(error, _lines(text)))
        except Exception:  # noqa: BLE001  (what has run left too little memory or stack)
            return None, Ending(Outcome.RERUN)
        if self._compiler.warned or not self._exact or not self._is_untouched():
            return None, Ending(Outcome.RERUN)
        if self._error is not None or self._ran == len(text):
            return None, Ending(Outcome.DONE, self._error)
        code = self._compile_part(text[self._ran :])
        return code, Ending(Outcome.RERUN if code is None else Outcome.DONE)

    def _compile_alone(self, text: str) -> tuple[types.CodeType | None, Ending]:
        """The whole block, of which nothing has run, as plain Python would."""
        self._lines += _lines(text)
        try:
            code = compile(text, self._filename, "exec", self.flags, dont_inherit=True)
        except Exception as error:  # noqa: BLE001  (the block's result)
            return None, Ending(Outcome.DONE, raised_by_compiler(error, self._lines))
        self.flags |= code.co_flags & _FUTURE_FLAGS
        return code, Ending(Outcome.DONE)

    def _compile_part(self, text: str) -> types.CodeType | None:
        """Compile the next statements; None: they cannot run apart from the whole."""
        if _REVEALING.search(text) or not self._is_untouched():
            self._exact = False
            return None
        # A statement on line 1, so that a string literal here is no docstring; then empty lines.
        before = len(self._lines)
        source = "0" + "\n" * before + text if before else text
        try:
            code = self._compiler.compile(source, self._filename, self.flags)
        except Exception:  # noqa: BLE001  (``finish`` tells what it means)
            return None
        if self._compiler.warned:
            self._exact = False
            return None
        self.flags |= code.co_flags & _FUTURE_FLAGS
        self._lines += _lines(text)
        self._ran += len(text)
        return _share_constants(code, self._constants)

    def _is_untouched(self) -> bool:
        """Whether nothing is in place that would notice that statements run one by one."""
        return (
            self._namespace.get("__builtins__") is self._builtins
            and "__annotations__" in self._namespace
            and _watchers() == self._watchers
        )


class _Compiler:
    """Compiles with the settings of the start, whatever the block has changed since."""

    def __init__(self) -> None:
        self.warned = False  # the last text would have shown a warning
        self._filters = list(warnings.filters)
        self._max_digits = sys.get_int_max_str_digits()
        self._max_depth = sys.getrecursionlimit()

    def compile(self, text: str, filename: str, flags: int) -> types.CodeType:
        seen: list[object] = []
        module: Any = warnings
        # Set as plain attributes: ``catch_warnings`` would make warnings that the block has
        # already shown appear once more.
        filters, show = module.filters, module._showwarnmsg  # noqa: SLF001
        max_digits, max_depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
        module.filters, module._showwarnmsg = self._filters, seen.append  # noqa: SLF001
        sys.set_int_max_str_digits(self._max_digits)
        sys.setrecursionlimit(self._max_depth)
        try:
            code: types.CodeType = compile(text, filename, "exec", flags, dont_inherit=True)
        finally:
            sys.setrecursionlimit(max_depth)
            sys.set_int_max_str_digits(max_digits)
            module.filters, module._showwarnmsg = filters, show  # noqa: SLF001
            self.warned = bool(seen)
        return code


def _share_constants(code: types.CodeType, known: dict[Any, Any]) -> types.CodeType:
    """Give equal constants of all statements one object, as compiling them together does."""
    shared = tuple(_share(constant, known)[1] for constant in code.co_consts)
    if all(map(operator.is_, shared, code.co_consts)):
        return code
    return code.replace(co_consts=shared)


def _share(constant: Any, known: dict[Any, Any]) -> tuple[Any, Any]:
    """Its key, which tells apart what is equal but not the same, and the object to use."""
    if isinstance(constant, types.CodeType):
        return None, _share_constants(constant, known)
    kind = type(constant)
    if kind is tuple:
        pairs = [_share(item, known) for item in constant]
        key: Any = (kind, *(key for key, _ in pairs))
        constant = tuple(item for _, item in pairs)
    elif kind is frozenset:
        key = (kind, frozenset(_share(item, known)[0] for item in constant))
    elif kind is float or kind is complex:
        key = (kind, constant, str(constant))  # 0.0 and -0.0
    else:
        key = (kind, constant)
    return key, known.setdefault(key, constant)


_returning_forks = 0
_counts_forks = False


def _watchers() -> tuple[object, ...]:
    """What observes frames and calls, and how many forks may come back to the block's code."""
    global _counts_forks
    if not _counts_forks:
        _counts_forks = True
        os.register_at_fork(after_in_parent=_count_fork)
    monitoring: Any = getattr(sys, "monitoring", None)
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring else []
    return (sys.gettrace(), sys.getprofile(), tools, _returning_forks)


def _count_fork() -> None:
    global _returning_forks
    caller = sys._getframe(1).f_globals.get("__name__")  # noqa: SLF001
    # The children of these two never return to the caller.
    if caller not in ("multiprocessing.popen_fork", "subprocess"):
        _returning_forks += 1


def _lines(text: str) -> list[str]:
    """As ``readlines`` of a file does; ``str.splitlines`` also splits at form feeds and others."""
    return io.StringIO(text).readlines()
