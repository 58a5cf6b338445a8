"""Finds fenced code blocks in a stream of bytes, as Markdown does (CommonMark 0.31, section 4.5).

What opens a block: at most three spaces, three or more backticks, an info string without backticks,
the end of the line. What closes it: on a line of its own, at least as many backticks.

Two points differ from a Markdown renderer, because what a model writes is acted upon at once:

* a block of *code we run* is closed by the last backtick needed, without waiting for the rest of
  the line, unless it stands inside a Python string;
* any other block (``output``, ``json``, no info string) is only skipped. A Python fence inside it
  is quoted text and does not run, and one left open swallows what follows, as it does on a page.
"""

from __future__ import annotations

import codecs
import enum
import re

from thor_fast.tools.string_lexer import StringLexer

__all__ = ["FenceEvent", "FenceScanner"]

_BACKTICK, _NEWLINE, _SPACE = b"`\n "
_BLANKS = b" \t\r"
_MIN_TICKS = 3
_MAX_INDENT = 3
# A line that begins a statement, by its first word and the byte behind it or by another opener; by
# the indent of the block's opening fence. A backtick may yet become the closing fence.
_STATEMENT = [
    re.compile(rb" {0,%d}(?:[A-Za-z_]\w*[^\w]|[\"'(\[{@~+*-])" % indent)
    for indent in range(_MAX_INDENT + 1)
]


class FenceEvent(enum.Enum):
    """What a byte completed."""

    TICK = enum.auto()
    """The first backtick of a line outside any block: an opening fence may start here."""
    CLOSED = enum.auto()
    """The closing fence of a block to run; its code is in ``FenceScanner.code``."""


class _Where(enum.Enum):
    TEXT = enum.auto()
    INFO = enum.auto()
    CODE = enum.auto()
    OTHER = enum.auto()


class FenceScanner:
    """Feed bytes in order; each returns the event it completes, if any.

    ``languages``: the info strings, lower case, of blocks to run. ``code`` is the text of the last
    block that closed, without the indentation of its opening fence.
    """

    __slots__ = (
        "_body", "_fence", "_indent", "_info", "_languages", "_lexer", "_line", "_line_start",
        "_opening_indent", "_ticks", "_where", "code",
    )  # fmt: skip

    def __init__(self, languages: frozenset[str]) -> None:
        self._languages = languages
        self.code = ""
        self.restart()

    def restart(self) -> None:
        """Forget everything and stand at the start of a line, outside any block."""
        self._where = _Where.TEXT
        self._fence = self._opening_indent = 0
        self._info = bytearray()
        self._body = bytearray()
        self._line_start = 0
        self._lexer = StringLexer()
        self._start_line()

    @property
    def in_code(self) -> bool:
        """The next byte belongs to a block to run, or to its closing fence."""
        return self._where is _Where.CODE

    @property
    def line_start(self) -> int:
        """Where in the block of :attr:`in_code` its last line starts, in bytes."""
        return self._line_start

    def draft(self) -> str | None:
        """The block's code so far, if its last line has begun a statement, by the look of it.

        It is a prefix of what ``code`` will be.
        """
        if not _STATEMENT[self._opening_indent].match(self._body, self._line_start):
            return None
        return codecs.utf_8_decode(self._outdented(self._body), "replace", False)[0]

    @property
    def idle(self) -> bool:
        """Bytes up to the end of this line change nothing and need not be fed."""
        return not self._line and self._where in (_Where.TEXT, _Where.OTHER)

    def feed(self, byte: int) -> FenceEvent | None:
        """Take the next byte."""
        match self._where:
            case _Where.TEXT:
                return self._text(byte)
            case _Where.INFO:
                self._in_info(byte)
            case _Where.CODE:
                return self._in_code(byte)
            case _Where.OTHER:
                self._in_other(byte)
        return None

    def _start_line(self) -> None:
        # Whether the line so far is nothing but an indent and backticks, and how many of each.
        self._line = True
        self._indent = self._ticks = 0

    def _count(self, byte: int) -> None:
        """Follow the start of a line: up to three spaces, then backticks, then no longer it."""
        if byte == _NEWLINE:
            self._start_line()
        elif self._line and byte == _BACKTICK:
            self._ticks += 1
        elif self._line and byte == _SPACE and not self._ticks and self._indent < _MAX_INDENT:
            self._indent += 1
        else:
            self._line = False

    def _text(self, byte: int) -> FenceEvent | None:
        if self._line and self._ticks >= _MIN_TICKS and byte != _BACKTICK:
            self._where = _Where.INFO
            self._fence, self._opening_indent = self._ticks, self._indent
            self._info.clear()
            self._in_info(byte)
            return None
        self._count(byte)
        return FenceEvent.TICK if self._line and self._ticks == 1 else None

    def _in_info(self, byte: int) -> None:
        if byte == _BACKTICK:  # ```python``` on one line is inline code, not a fence
            self._where = _Where.TEXT
            self._line = False
        elif byte != _NEWLINE:
            self._info.append(byte)
        else:
            info = self._info.decode(errors="replace").strip().lower()
            self._where = _Where.CODE if info in self._languages else _Where.OTHER
            self._body.clear()
            self._line_start = 0
            self._lexer = StringLexer()
            self._start_line()

    def _in_code(self, byte: int) -> FenceEvent | None:
        self._body.append(byte)
        self._count(byte)
        self._lexer.feed(byte)
        if byte == _NEWLINE:
            self._line_start = len(self._body)
        if not (self._line and self._ticks == self._fence) or self._lexer.in_string:
            return None
        body = self._body[: len(self._body) - self._fence - self._indent]
        self.code = self._outdented(body).decode(errors="replace")
        self._where = _Where.TEXT
        self._line = False
        return FenceEvent.CLOSED

    def _outdented(self, body: bytearray) -> bytes:
        # A block inside a list item is indented as a whole, like its opening fence.
        return re.sub(rb"(?m)^ {0,%d}" % self._opening_indent, b"", body)

    def _in_other(self, byte: int) -> None:
        closing = self._line and self._ticks >= self._fence
        if closing and byte in _BLANKS:
            return  # only blanks may follow a closing fence on its line
        if closing and byte == _NEWLINE:
            self._where = _Where.TEXT
        self._count(byte)
