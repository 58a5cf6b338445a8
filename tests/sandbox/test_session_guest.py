"""Blocks of one session share a namespace; what they raise is shown with the right lines."""

from __future__ import annotations

import io
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from . import statement_guest

GUEST = str(Path(__file__).parents[2] / "thor_fast" / "sandbox" / "guest")
statements = statement_guest.load(GUEST, "statements")
session_module = statement_guest.load(GUEST, "session")
report = statement_guest.load(GUEST, "report")


class Blocks:
    """A session, and what its blocks print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.namespace: dict[str, Any] = types.ModuleType("__main__").__dict__
        self._session = session_module.Session(self.namespace)
        self._capsys = capsys

    def run(self, *pieces: str) -> tuple[BaseException | None, str, str]:
        """One block; the error, and the text on stdout and stderr."""
        block = self._session.open()
        for piece in pieces[:-1]:
            block.feed(piece)
        outcome, error = block.finish(pieces[-1])
        assert outcome is statements.Outcome.DONE
        if error is not None:
            report.show_exception(error)
        return error, *self._capsys.readouterr()


@pytest.fixture
def blocks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Blocks:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # as a fresh interpreter has it
    return Blocks(capsys)


def test_later_blocks_find_what_earlier_ones_made(blocks: Blocks) -> None:
    assert blocks.run("import math\nx = [1]\ndef f():\n    return x, math.tau > 6\n")[0] is None
    assert blocks.run("x.append(2)\nprint(f())\n") == (None, "([1, 2], True)\n", "")
    assert blocks.run("x\n'shown nowhere'\n") == (None, "", "")


def test_traceback_shows_the_lines_of_each_block(blocks: Blocks) -> None:
    blocks.run("def inverse(n):\n    return 1 / n  # first\n")
    blocks.run("def twice(n):\n", "    return 2 * inverse(n)  # second\n", "y = 1\n")
    error, _, stderr = blocks.run("\n\ntwice(0)  # third\n")
    assert isinstance(error, ZeroDivisionError)
    lines = [line for line in stderr.splitlines() if line.strip(" ^~")]
    assert lines == [
        "Traceback (most recent call last):",
        '  File "block3.py", line 3, in <module>',
        "    twice(0)  # third",
        '  File "block2.py", line 2, in twice',
        "    return 2 * inverse(n)  # second",
        '  File "main.py", line 2, in inverse',
        "    return 1 / n  # first",
        "ZeroDivisionError: division by zero",
    ]


def test_exception_leaves_the_namespace_as_it_was_then(blocks: Blocks) -> None:
    error, stdout, _ = blocks.run("a = 1\nprint(a)\nraise ValueError('no')\na = 2\n")
    assert isinstance(error, ValueError)
    assert stdout == "1\n"
    assert blocks.run("print(a)\n") == (None, "1\n", "")


def test_block_that_does_not_compile_changes_nothing(blocks: Blocks) -> None:
    blocks.run("a = 1\n")
    error, _, stderr = blocks.run("a = 2\nreturn a\n")
    assert isinstance(error, SyntaxError)
    assert stderr.startswith('  File "block2.py", line 2\n    return a\n')
    assert blocks.run("print(a)\n") == (None, "1\n", "")


def test_system_exit_is_the_callers_to_see(blocks: Blocks) -> None:
    block = session_module.Session(blocks.namespace).open()
    error = block.finish("raise SystemExit(7)\n").error
    assert isinstance(error, SystemExit)
    assert error.code == 7


def test_future_imports_stay_in_effect(blocks: Blocks) -> None:
    blocks.run("from __future__ import annotations\n")
    assert blocks.run("def f(x: nothing): pass\n") == (None, "", "")
    assert blocks.run("def g(x: f): pass\n", "print(g.__annotations__)") == (
        None,
        "{'x': 'f'}\n",
        "",
    )


def test_warning_of_the_same_line_number_is_shown_in_each_block(blocks: Blocks) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *args: print(args[2], args[3])
        assert blocks.run("import warnings\nwarnings.warn('w')\n")[1] == "main.py 2\n"
        assert blocks.run("1\nfor _ in '12':\n    warnings.warn('w')\n")[1] == "block2.py 3\n"
        assert blocks.run("1\n1\nwarnings.warn('w')\n")[1] == "block3.py 3\n"


def test_excepthook_of_the_block_shows_its_exceptions(blocks: Blocks) -> None:
    blocks.run(
        "import sys\nsys.excepthook = lambda kind, error, trace: print(kind, trace.tb_lineno)"
    )
    assert blocks.run("\n1 / 0\n")[1:] == ("<class 'ZeroDivisionError'> 2\n", "")


def test_showing_an_exception_leaves_other_files_alone(blocks: Blocks, tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("def fail():\n    raise ValueError  # of the file\n")
    real = io.open
    _, _, stderr = blocks.run(
        f"import sys\nsys.path.append({str(tmp_path)!r})\nimport other\nother.fail()\n"
    )
    assert "    other.fail()\n" in stderr
    assert "    raise ValueError  # of the file\n" in stderr
    assert io.open is real
