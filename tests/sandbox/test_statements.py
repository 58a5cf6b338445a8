"""A block run statement by statement ends as the whole block does."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from . import statement_guest
from .statement_programs import INVALID, INVALID_AS_TEXT, REVEALING, TYPICAL, VALID

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST = str(Path(__file__).parents[2] / "thor_fast" / "sandbox" / "guest")
PLAIN = [sys.executable, "-I", "-S", "-B", "-X", "utf8"]
statements = statement_guest.load(GUEST, "statements")


class Result(NamedTuple):
    stdout: str
    stderr: str
    exit_code: int


class Guest:
    """A process that runs blocks, each in a fork of its own."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [*PLAIN, statement_guest.__file__, GUEST],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def whole(self, text: str) -> Result:
        return self._run({"whole": text})

    def pieces(self, pieces: list[str]) -> tuple[str, Result]:
        """The outcome, and the result that it stands for."""
        result = self._run({"pieces": pieces})
        outcome = self._folder.joinpath("outcome").read_text()
        if outcome == "DISCARD":
            return outcome, Result("", self._folder.joinpath("error").read_text(), 1)
        return outcome, result

    def _run(self, request: dict[str, Any]) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        out, err = (
            self._folder.joinpath(name).read_bytes().decode() for name in ("stdout", "stderr")
        )
        return Result(out, err, code)

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    guest = Guest(tmp_path_factory.mktemp("guest"))
    yield guest
    guest.close()


def plain(text: str, folder: Path) -> Result:
    """What ``python main.py`` does."""
    folder.joinpath("main.py").write_text(text, encoding="utf-8", newline="")
    done = subprocess.run(
        [*PLAIN, "main.py"], cwd=folder, capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    stdout, stderr = (
        stream.decode().replace(f"{folder}/", "") for stream in (done.stdout, done.stderr)
    )
    return Result(stdout, stderr, done.returncode)


def splittings(text: str) -> list[list[str]]:
    chooser = random.Random(len(text))
    cuts = [0, *sorted(chooser.randrange(len(text) + 1) for _ in range(8)), len(text)]
    return [[*text, ""], [text[a:b] for a, b in itertools.pairwise(cuts)]]


@pytest.mark.parametrize("name", VALID)
def test_valid_program_is_as_with_plain_python(name: str, guest: Guest, tmp_path: Path) -> None:
    expected = plain(VALID[name], tmp_path)
    for pieces in splittings(VALID[name]):
        assert guest.pieces(pieces) == ("DONE", expected)


@pytest.mark.parametrize("name", INVALID)
def test_invalid_program_is_as_never_run(name: str, guest: Guest, tmp_path: Path) -> None:
    expected = plain(INVALID[name], tmp_path)
    assert (expected.stdout, expected.exit_code) == ("", 1)
    for pieces in splittings(INVALID[name]):
        outcome, result = guest.pieces(pieces)
        assert outcome in ("DONE", "DISCARD")
        assert result == expected


@pytest.mark.parametrize("name", INVALID_AS_TEXT)
def test_text_that_compile_refuses_is_refused_alike(name: str, guest: Guest) -> None:
    expected = guest.whole(INVALID_AS_TEXT[name])
    assert (expected.stdout, expected.exit_code) == ("", 1)
    for pieces in splittings(INVALID_AS_TEXT[name]):
        assert guest.pieces(pieces)[1] == expected


@pytest.mark.parametrize("name", REVEALING)
def test_what_would_show_is_run_anew(name: str, guest: Guest) -> None:
    assert guest.pieces([*REVEALING[name], ""])[0] == "RERUN"


@pytest.mark.parametrize("name", ["no namespace", "builtins", "profile", "warns late"])
def test_what_would_show_does_not_matter_to_a_whole_block(name: str, guest: Guest) -> None:
    assert guest.pieces([REVEALING[name]]) == ("DONE", guest.whole(REVEALING[name]))


PARTS = [text for name, text in VALID.items() if name != "form feeds"]
EDITS = [
    "",
    "(",
    ")",
    "'",
    '"""',
    "\n",
    " ",
    ":",
    "\\",
    "#",
    "\t",
    "else",
    "=",
    ";",
    "\r",
    "@",
    "é",
]


@st.composite
def edited_programs(draw: st.DrawFn) -> str:
    """Some programs after one another, with at most two edits anywhere."""
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
    text = "".join(part if part.endswith("\n") else part + "\n" for part in parts)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        length = draw(st.integers(0, 3))
        text = text[:start] + draw(st.sampled_from(EDITS)) + text[start + length :]
    return text


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=edited_programs(), seed=st.integers(0, 2**32))
@example(text="if 1:\n  pass\nel\u017fe:\n  pass\n", seed=5)  # reads as "else" once normalised
def test_any_program_in_any_pieces(guest: Guest, text: str, seed: int) -> None:
    chooser = random.Random(seed)
    cuts = sorted({0, len(text), *(chooser.randrange(len(text) + 1) for _ in range(seed % 40))})
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)] or [""]
    expected = guest.whole(text)
    outcome, result = guest.pieces(pieces)
    if outcome == "RERUN":
        assert "Warning" in expected.stderr
    else:
        assert comparable(result, text) == comparable(expected, text)


def comparable(result: Result, text: str) -> Result:
    """Without addresses, which edits bring to light, and without some carets.

    The interpreter measures joined lines that are not ASCII differently where the text is also
    in a file.
    """
    result = result._replace(stdout=re.sub("0x[0-9a-f]+", "0x", result.stdout))
    if text.isascii():
        return result
    lines = result.stderr.splitlines(keepends=True)
    return result._replace(stderr="".join(line for line in lines if line.strip(" ^\n")))


@pytest.mark.parametrize("share", range(0, 100, 3))
def test_truncated_anywhere(guest: Guest, share: int) -> None:
    text = "ran = []\n" + "".join(TYPICAL)
    text = text[: len(text) * share // 100]
    assert guest.pieces([*text, ""])[1] == guest.whole(text)


def test_depth_of_the_stack_is_that_of_a_whole_block(guest: Guest) -> None:
    text = "def f(n):\n    print(n)\n    f(n + 1)\nf(0)\npass\n"
    at_once, one_by_one = (
        guest.pieces(pieces)[1].stdout.splitlines() for pieces in ([text], [*text, ""])
    )
    assert len(at_once) > 900
    # Python 3.11 counts a call from optimised code differently.
    assert abs(len(at_once) - len(one_by_one)) <= (sys.version_info < (3, 12))


def test_fork_that_does_not_come_back(guest: Guest) -> None:
    text = (
        "import multiprocessing as mp, subprocess, sys\n"
        "with mp.get_context('fork').Pool(1) as pool:\n    print(pool.map(abs, [-1]))\n"
        "subprocess.run([sys.executable, '-c', ''], preexec_fn=int)\nprint('end')\n"
    )
    assert guest.pieces([*text, ""]) == ("DONE", Result("[1]\nend\n", "", 0))


def test_statement_has_run_before_the_next_but_one_arrives() -> None:
    namespace: dict[str, Any] = {"ran": []}
    block = statements.Statements(namespace)
    for number, text in enumerate(TYPICAL[:-1]):
        for character in text:
            assert block.feed(character)
        # The second only defines a function.
        assert set(range(number)) - {1} <= set(namespace["ran"])
    assert block.finish("ran.append(8)\n") == (statements.Outcome.DONE, None)
    assert namespace["ran"] == [0, 2, 3, 4, 5, 6, 7, 8]


def test_simple_statement_runs_at_its_newline() -> None:
    namespace: dict[str, Any] = {}
    block = statements.Statements(namespace)
    block.feed("x = 1")
    assert "x" not in namespace
    block.feed("\n")
    assert namespace["x"] == 1


def test_compound_statement_runs_when_the_next_word_is_known() -> None:
    namespace: dict[str, Any] = {"n": 0}
    block = statements.Statements(namespace)
    block.feed("if 1:\n    n += 1\n\nel")
    assert namespace["n"] == 0
    block.feed("ectron")
    assert namespace["n"] == 1
    block.feed(" = 1\nfor n in (5,):\n    pass\nel")
    block.feed("se:\n    n = 7\n")
    assert namespace["n"] == 1
    assert block.finish().outcome is statements.Outcome.DONE
    assert namespace["n"] == 7


def test_exception_is_kept_and_nothing_runs_after_it() -> None:
    namespace: dict[str, Any] = {}
    block = statements.Statements(namespace)
    assert block.feed("x = 1\n")
    assert not block.feed("raise SystemExit(3)\n")
    assert not block.feed("x = 2\n")
    ending = block.finish("x = 3\n")
    assert namespace["x"] == 1
    assert isinstance(ending.error, SystemExit)
    assert ending.error.__traceback__.tb_frame.f_code.co_filename == "main.py"


def test_limits_that_the_block_raised_do_not_admit_later_text() -> None:
    block = statements.Statements({})
    digits = sys.get_int_max_str_digits()
    try:
        assert block.feed("import sys\nsys.set_int_max_str_digits(0)\n")
        ending = block.finish(f"x = {'1' * 5000}\n")
        assert sys.get_int_max_str_digits() == 0
    finally:
        sys.set_int_max_str_digits(digits)
    assert ending.outcome is statements.Outcome.DISCARD
    assert "5000 digits" in str(ending.error)


def test_no_text_is_compiled_more_than_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = statements._Compiler.compile

    def counted(self: Any, text: str, *args: Any) -> Any:
        compiled.append(text)
        return real(self, text, *args)

    monkeypatch.setattr(statements._Compiler, "compile", counted)
    text = "x = 1\nif x:\n    '''\na\nb\n'''\nelse:\n    x = 2\n" * 100
    block = statements.Statements({})
    for character in text:
        block.feed(character)
    assert block.finish().outcome is statements.Outcome.DONE
    assert len(compiled) == 200 + 1
    assert sum(len(part.lstrip("0\n")) for part in compiled) <= 2 * len(text)


def test_signal_handler_that_raises_between_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    block = statements.Statements({})
    assert block.feed("x = 1\n")

    def interrupted(*args: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(block._splitter, "feed", interrupted)
    assert not block.feed("x = 2\n")
    assert block.finish("x = 3\n") == (statements.Outcome.RERUN, None)
