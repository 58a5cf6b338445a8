"""Where a Python text that arrives in pieces may be cut into statements that run on their own."""

from __future__ import annotations

import re

_CLAUSES = frozenset(("else", "elif", "except", "finally"))  # what continues a compound statement
_COMPOUND = frozenset(("if", "while", "for", "try", "with", "def", "class", "async", "match"))
_LONGEST_CLAUSE = max(map(len, _CLAUSES))
_WORD = re.compile(r"\w+")
_OPENERS = frozenset("\"'([{@~+-*.")  # how a statement starts that does not start with a word
_PROLOGUE = re.compile(r"[rRuU]?[\"']|from\s+__future__\b")
_SPECIAL = re.compile(r"#|'''|\"\"\"|['\"]|[(\[{]|[)\]}]|\\\n")
_STRING_REST = {  # what follows an opening quote, up to the closing one
    "'": re.compile(r"[^\\']*(?:\\.[^\\']*)*'", re.DOTALL),
    '"': re.compile(r'[^\\"]*(?:\\.[^\\"]*)*"', re.DOTALL),
    "'''": re.compile(r"[^\\']*(?:(?:\\.|'(?!''))[^\\']*)*'''", re.DOTALL),
    '"""': re.compile(r'[^\\"]*(?:(?:\\.|"(?!""))[^\\"]*)*"""', re.DOTALL),
}


class Splitter:
    """Cuts text that arrives in pieces after top-level statements that look complete.

    A simple statement is complete at its newline, a compound one when the next line starts with
    a token that does not continue it. Leading docstring and ``from __future__`` statements are
    held back until one of another kind is complete, since only together do they mean what they say.
    """

    def __init__(self) -> None:
        self._line: list[str] = []  # the parts of a line without its newline yet
        self._pending: list[str] = []  # whole lines, not handed out
        self._kind = ""  # of the last statement in them: "", "simple", "compound", "decorator"
        self._prologue = True
        self._looked = False  # the start of the line without its newline was judged
        self._quote = ""  # of the string that goes on
        self._depth = 0  # of brackets
        self._joined = False  # by a backslash to the next line

    def feed(self, text: str) -> str:
        """Take more text, newlines translated; returns the whole lines now complete, or ''."""
        ready: list[str] = []
        *ends, start = text.split("\n")
        for end in ends:
            self._line.append(end + "\n")
            line = "".join(self._line)
            self._line.clear()
            self._end_line(line, ready)
            self._looked = False
        if start:
            self._line.append(start)
            if not self._looked and self._kind == "compound" and self._between_statements():
                self._look(ready)
        return "".join(ready)

    def _look(self, ready: list[str]) -> None:
        begins = _begins_statement("".join(self._line))
        self._looked = begins is not None
        if begins:
            self._hand_out(ready)

    def _end_line(self, line: str, ready: list[str]) -> None:
        if self._between_statements() and _begins_statement(line):
            if self._kind == "decorator":
                self._kind = "decorator" if line[0] == "@" else "compound"
            else:
                self._hand_out(ready)
                self._begin(line)
        self._pending.append(line)
        self._scan(line)
        if self._kind == "simple" and self._between_statements():
            self._hand_out(ready)

    def _begin(self, line: str) -> None:
        word = _WORD.match(line)
        if line[0] == "@":
            self._kind = "decorator"
        else:
            self._kind = "compound" if word and word[0] in _COMPOUND else "simple"
        self._prologue = self._prologue and _PROLOGUE.match(line) is not None

    def _hand_out(self, ready: list[str]) -> None:
        if self._kind and not self._prologue:
            ready.extend(self._pending)
            self._pending.clear()
        self._kind = ""

    def _between_statements(self) -> bool:
        return not (self._depth or self._quote or self._joined)

    def _scan(self, line: str) -> None:
        """Follow strings, brackets and joined lines through one whole line."""
        position = 0
        if self._quote:
            position = self._skip_string(self._quote, line, 0)
        self._joined = False
        while found := _SPECIAL.search(line, position):
            mark, position = found[0], found.end()
            if mark == "#":
                return
            if mark in _STRING_REST:
                position = self._skip_string(mark, line, position)
            elif mark == "\\\n":
                self._joined = True
            elif mark in "([{":
                self._depth += 1
            else:
                self._depth = max(self._depth - 1, 0)

    def _skip_string(self, quote: str, line: str, start: int) -> int:
        end = _STRING_REST[quote].match(line, start)
        if end is not None:
            self._quote = ""
            return end.end()
        body = line[:-1]
        backslashes = len(body) - len(body.rstrip("\\"))
        self._quote = quote if len(quote) == 3 or backslashes % 2 else ""
        return len(line)


def _begins_statement(line: str) -> bool | None:
    """Whether a top-level statement begins with this line; None: too little of it is known."""
    word = _WORD.match(line)
    if word is None:
        return line[0] in _OPENERS
    if word.end() == len(line) <= _LONGEST_CLAUSE:
        return None
    return word[0] not in _CLAUSES
