"""Just enough of Python's lexer to know, byte by byte, whether we stand inside a string.

A closing fence in the middle of a docstring is text, not the end of the block. That needs strings,
escapes and comments; names, numbers and brackets do not matter. Nor do string prefixes: in a raw
string, too, a backslash keeps the quote after it from ending the string. An f-string counts as
one string, so a quote reused within its braces (Python 3.12) reads as its end, and the next one as
a new beginning: wrong inside the braces, right again behind them.
"""

from __future__ import annotations

__all__ = ["StringLexer"]

_BACKSLASH, _NEWLINE, _HASH = b"\\\n#"
_QUOTES = b"'\""


class StringLexer:
    """Feed source bytes in order; ``in_string`` is the state after the last one.

    A single-quoted string that is not closed ends at the end of its line, as the error it is,
    unless a backslash continues the line. UTF-8 needs no decoding: bytes of multi-byte characters
    are never quotes.
    """

    __slots__ = ("_comment", "_escaped", "_quote", "_run", "_triple")

    def __init__(self) -> None:
        self._quote = 0  # the byte that opened the string, 0 outside
        self._triple = False
        self._run = 0  # quotes in a row: of an opening (outside triple) or a closing (inside)
        self._escaped = False
        self._comment = False

    @property
    def in_string(self) -> bool:
        # Two quotes in a row are an empty string unless a third follows.
        return self._quote != 0 and (self._triple or self._run < 2)

    def feed(self, byte: int) -> None:
        """Take the next byte of the source."""
        if self._quote:
            self._in_string(byte)
        elif self._comment:
            self._comment = byte != _NEWLINE
        elif byte in _QUOTES:
            self._quote, self._triple, self._run = byte, False, 1
        else:
            self._comment = byte == _HASH

    def _in_string(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif self._triple:
            self._run = self._run + 1 if byte == self._quote else 0
            self._escaped = byte == _BACKSLASH
            if self._run == 3:
                self._quote = 0
        elif self._run:  # right behind the opening quote or quotes
            self._after_opening(byte)
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte in (self._quote, _NEWLINE):
            self._quote = 0

    def _after_opening(self, byte: int) -> None:
        if byte == self._quote:
            self._run += 1
            if self._run == 3:
                self._triple, self._run = True, 0
            return
        empty = self._run == 2
        self._run = 0
        if empty:
            self._quote = 0
            self.feed(byte)
        else:
            self._in_string(byte)
