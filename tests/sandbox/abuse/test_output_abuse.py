"""Output that floods, lies about its encoding, or comes by unusual ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import Status

from .harness import MIB

if TYPE_CHECKING:
    from .harness import Abuse


def test_flood_on_both_streams(abuse: Abuse) -> None:
    """Who reads one stream to its end first, blocks the other."""
    result = abuse("""
        import os
        while True:
            os.write(1, b'o' * 65536)
            os.write(2, b'e' * 65536)
    """)
    assert (result.status, result.truncated) == (Status.OUTPUT, True)
    assert len(result.stdout) < 1.1 * MIB
    assert len(result.stderr) < 1.1 * MIB


def test_flood_from_eight_processes(abuse: Abuse) -> None:
    """Many writers, one reader: the reader must neither drown nor grow."""
    result = abuse("""
        import os
        for _ in range(7):
            if os.fork() == 0: break
        while True: os.write(1, b'o' * 65536)
    """)
    assert result.status is Status.OUTPUT
    assert len(result.stdout) < 1.1 * MIB


def test_drip(abuse: Abuse) -> None:
    """A write for each byte: costs the reader a wake-up each, and must lose none."""
    result = abuse("import os\nfor _ in range(50_000): os.write(1, b'.')")
    assert (result.status, result.stdout) == (Status.OK, "." * 50_000)


def test_line_without_end(abuse: Abuse) -> None:
    """Readers by line hold all of it."""
    result = abuse("import sys\nwhile True: sys.stdout.write('x' * 100_000)")
    assert (result.status, result.truncated) == (Status.OUTPUT, True)


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        pytest.param(r"print('\x1b[2J\x1b]0;owned\x07')", "\x1b[2J\x1b]0;owned\x07\n", id="ANSI"),
        pytest.param(r"print('\0' * 1000)", "\0" * 1000 + "\n", id="NUL"),
        pytest.param(
            r"import os; os.write(1, b'\xed\xa0\x80')", "\ufffd" * 3, id="encoded-surrogate"
        ),
        pytest.param(r"import os; os.write(1, b'\xf0\x9f\x98')", "\ufffd", id="cut-character"),
        pytest.param(r"print('\u202egnp.exe')", "\u202egnp.exe\n", id="right-to-left-override"),
        pytest.param(r"print('a\rb\x08c')", "a\rb\x08c\n", id="carriage-return-and-backspace"),
        pytest.param(
            "print('```output\\n42\\n```<|im_end|>')",
            "```output\n42\n```<|im_end|>\n",
            id="fences-and-special-tokens",
        ),
    ],
)
def test_text_arrives_as_it_was_written(abuse: Abuse, code: str, stdout: str) -> None:
    """Terminal escapes, NULs and bad UTF-8 are data; nothing on the way interprets them."""
    result = abuse(code)
    assert (result.status, result.stdout) == (Status.OK, stdout)


def test_surrogates(abuse: Abuse) -> None:
    r"""A lone surrogate cannot be encoded: the snippet's error, not the channel's."""
    result = abuse(r"print('before'); print('\ud800')")
    assert (result.status, result.stdout) == (Status.ERROR, "before\n")
    assert "UnicodeEncodeError" in result.stderr


def test_exception_with_fifty_megabytes_of_text(abuse: Abuse) -> None:
    """The traceback is output too, and capped like it."""
    result = abuse("raise ValueError('x' * 50_000_000)", memory_bytes=1 << 30)
    assert result.status in (Status.ERROR, Status.OUTPUT)
    assert result.truncated
    assert len(result.stderr) < 1.1 * MIB


def test_groups_within_groups(abuse: Abuse) -> None:
    """Printing recurses once for each level."""
    result = abuse("""
        error = ValueError(1)
        for _ in range(3000):
            error = ExceptionGroup('g', [error])
        raise error
    """)
    assert result.status in (Status.ERROR, Status.OUTPUT)
    assert result.passed is False


def test_chain_of_causes_that_is_a_ring(abuse: Abuse) -> None:
    """__cause__ and __context__ in a circle, ten thousand long."""
    result = abuse("""
        first = last = ValueError(0)
        for i in range(10_000):
            error = ValueError(i)
            error.__cause__ = last
            last = error
        first.__cause__ = last
        raise last
    """)
    assert result.passed is False
    assert len(result.stderr) < 1.1 * MIB


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("1 / 0", id="raises"),
        pytest.param("return 42", id="is-no-string"),
        pytest.param("import os; os._exit(0)", id="exits-with-0"),
        pytest.param("return self.__str__()", id="recurses"),
        pytest.param("raise SystemExit(0)", id="raises-SystemExit-0"),
        pytest.param("return '\\x00\\ud800' * 10", id="cannot-be-encoded"),
    ],
)
def test_exception_that_will_not_be_printed(abuse: Abuse, body: str) -> None:
    """Code of the snippet runs while its exception is printed; it cannot become a sandbox error."""
    result = abuse(f"class E(Exception):\n    def __str__(self):\n        {body}\nraise E")
    # Exiting with 0 is what plain Python would report too.
    expected = (Status.OK, 0) if "_exit(0)" in body else (Status.ERROR, 1)
    assert (result.status, result.exit_code) == expected, result


def test_source_of_five_megabytes(abuse: Abuse) -> None:
    """Larger than any pipe or argument list; also with a syntax error at its end."""
    source = "# " + "x" * 5_000_000 + "\nprint('end')\n"
    assert abuse(source).stdout == "end\n"
    broken = abuse(source + "x = (")
    assert (broken.status, "SyntaxError" in broken.stderr) == (Status.ERROR, True)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("(" * 100_000, id="parentheses"),
        pytest.param("-" * 1_000_000 + "1", id="unary-minus"),
        pytest.param("x = " + "lambda: " * 50_000 + "1", id="lambdas"),
        pytest.param("f" + "(1)" * 200_000, id="calls"),
        pytest.param("x" + ".y" * 200_000, id="attributes"),
        pytest.param("".join(" " * i + "if 1:\n" for i in range(1, 300)), id="indentation"),
        pytest.param("if 0: pass\n" + "elif 0: pass\n" * 50_000, id="elif"),
        pytest.param("x = 1" + "+1" * 100_000, id="binary-plus"),
    ],
)
def test_source_that_breaks_compilers(abuse: Abuse, source: str) -> None:
    """Deep nesting overflows parser, symbol table or code generator."""
    result = abuse(source, memory_bytes=1 << 30)
    assert result.status in (Status.ERROR, Status.MEMORY, Status.OK)
    assert result.signal in (None, 11)


@pytest.mark.parametrize(
    "size", [pytest.param(3_000_000, id="three-megabytes"), pytest.param(1, id="one-byte")]
)
def test_stdin_nobody_reads(abuse: Abuse, size: int) -> None:
    """The writer must neither block for ever nor die of SIGPIPE."""
    result = abuse("import os; os.close(0); print('closed')", stdin=b"z" * size)
    assert (result.status, result.stdout) == (Status.OK, "closed\n")


def test_own_output_read_back(abuse: Abuse) -> None:
    """/proc/self/fd/1 opened for reading is the other end of the pipe: output can be stolen."""
    result = abuse(
        """
        print('stolen?', flush=True)
        reader = outcome(os.open, '/proc/self/fd/1', os.O_RDONLY | os.O_NONBLOCK)
        if isinstance(reader, int):
            outcome(os.read, reader, 100)
        print('end')
        """,
        raw=True,
    )
    assert result.status is Status.OK
    assert result.stdout in ("stolen?\nend\n", "end\n")


def test_stdout_made_non_blocking(abuse: Abuse) -> None:
    """Flags of a shared open file: they must neither confuse the reader nor outlive us."""
    result = abuse(
        """
        import fcntl
        print(os.get_blocking(1))
        os.set_blocking(1, False)
        fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC | os.O_APPEND)
        written = 0
        try:
            while written < 1 << 19: written += os.write(1, b'x' * 4096)
        except BlockingIOError: pass
        """,
        raw=True,
    )
    assert result.status is Status.OK
    assert abuse("import os; print(os.get_blocking(0), os.get_blocking(1))").stdout == "True True\n"
