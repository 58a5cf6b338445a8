"""Streams and sessions of the native sandbox."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thor_fast.errors import SandboxError
from thor_fast.sandbox import ExecutionRequest, NativeSandbox, Status
from thor_fast.sandbox.session import block_result

if TYPE_CHECKING:
    pass


def stream(sandbox: NativeSandbox, code: str, size: int, **request: object) -> object:
    with sandbox.open(ExecutionRequest("", **request)) as block:  # type: ignore[arg-type]
        for start in range(0, len(code), size):
            block.feed(code[start : start + size])
        return block.finish()


PROGRAMS = [
    "print(1)\nprint(2)\n",
    "import math\nx = math.factorial(20)\nprint(x)",
    "",
    "x = 1",
    "print('a')\nraise ValueError('b')\nprint('c')\n",
    "print('a')\n\ndef f():\n    return 1 / 0\n\nf()\nprint('never')\n",
    "print('gone')\nx = (\n",
    "print('gone')\n1 / 0\nx = )\n",
    "import sys\nprint('a')\nsys.exit(3)\nprint('b')\n",
    "import os\nprint('a', flush=True)\nos._exit(4)\nprint('b')\n",
    "import os\nprint('a', flush=True)\nos._exit(4)\nprint('b'\n",
    "import os\nos.kill(os.getpid(), 9)\nprint('b')\n",
    "if True:\n    print('if')\nelse:\n    print('else')\nfor i in range(3):\n    print(i)\n",
    "print('''one\ntwo''')\nprint('three', end='')\n",
    "print('out')\nreturn 5\n",
    "import warnings\nprint('\\d')\n",
    "raise SystemExit('message')\n",
    "import sys\nprint('x' * 10, file=sys.stderr)\nbytearray(1 << 40)\nprint('no')\n",
]


@pytest.mark.parametrize("code", PROGRAMS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_ends_as_the_whole_block(sandbox: NativeSandbox, code: str, size: int) -> None:
    whole = sandbox.execute(code)
    fed = stream(sandbox, code, size)
    for name in ("status", "stdout", "stderr", "exit_code", "signal", "truncated"):
        assert getattr(fed, name) == getattr(whole, name), name


def test_statements_run_while_the_text_still_comes(sandbox: NativeSandbox) -> None:
    """The sleep of the first statement passes while the second is not there yet."""
    with sandbox.open() as block:
        block.feed("import time\ntime.sleep(0.5)\nprint('slept')\nx =")
        deadline = time.monotonic() + 60
        while sandbox.stats()["completed"] < sandbox.stats()["submitted"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        block.feed(" 1\nprint(x)\n")
        result = block.finish()
    assert (result.status, result.stdout) == (Status.OK, "slept\n1\n")
    assert result.wall_s >= 0.5


def test_a_streams_limits_are_those_of_its_statements(sandbox: NativeSandbox) -> None:
    with sandbox.open(ExecutionRequest("", timeout_s=2)) as block:
        block.feed("print('a')\nx = 1\n")
        time.sleep(2.5)  # the model thinks; this is not the snippet's time
        block.feed("print('b')\n")
        assert block.finish().stdout == "a\nb\n"
    spun = stream(sandbox, "print('a')\nwhile True: pass\nprint('b')\n", 5, timeout_s=2)
    assert (spun.status, spun.stdout) == (Status.TIMEOUT, "a\n")


def test_a_streams_output_is_capped_as_a_whole(sandbox: NativeSandbox) -> None:
    code = "".join(f"print({i} * 'x')\n" for i in range(150))
    whole = sandbox.execute(ExecutionRequest(code, max_output_bytes=1000))
    fed = stream(sandbox, code, 50, max_output_bytes=1000)
    assert (fed.status, fed.stdout) == (whole.status, whole.stdout) == (Status.OUTPUT, fed.stdout)


def test_a_stream_gets_stdin_files_and_collects(sandbox: NativeSandbox) -> None:
    request = ExecutionRequest("", stdin="5", files={"a.txt": b"6"}, collect=("b.txt", "none"))
    with sandbox.open(request) as block:
        block.feed("x = int(input()) * int(open('a.txt').read())\n")
        block.feed("open('b.txt', 'w').write(str(x))\n")
        result = block.finish()
    assert (result.status, result.files) == (Status.OK, {"b.txt": b"30"})


def test_async_streams_interleave(sandbox: NativeSandbox) -> None:
    async def one(n: int) -> str:
        with sandbox.open() as block:
            for i in range(5):
                block.feed(f"print({n} * {i})\n")
                await asyncio.sleep(0)
            return (await block.afinish()).stdout

    async def main() -> list[str]:
        return await asyncio.gather(*map(one, range(8)))

    expected = ["".join(f"{n * i}\n" for i in range(5)) for n in range(8)]
    assert asyncio.run(main()) == expected


def test_a_closed_stream_says_so(sandbox: NativeSandbox) -> None:
    block = sandbox.open()
    block.close()
    with pytest.raises(SandboxError, match="this stream is closed"):
        block.feed("print(1)\n")
    with pytest.raises(SandboxError, match="this stream is closed"):
        block.finish()


# --- sessions ------------------------------------------------------------------------------------


def test_state_lasts_from_block_to_block(sandbox: NativeSandbox) -> None:
    with sandbox.session() as session:
        assert session.execute("x = 6").stdout == ""
        assert session.execute("print(x * 7)").stdout == "42\n"
        failed = session.execute("def f():\n    return y\n\nz = 1\nf()")
        assert (failed.status, failed.exit_code) == (Status.ERROR, 1)
        assert 'File "block3.py", line 5' in failed.stderr
        assert session.execute("print(z)").stdout == "1\n"
    with sandbox.session() as other:
        assert "NameError" in other.execute("x").stderr


@pytest.mark.parametrize("rewindable", [False, True])
def test_endings_of_blocks(sandbox: NativeSandbox, rewindable: bool) -> None:
    with sandbox.session(rewindable=rewindable) as session:
        assert session.execute("import sys\nx = 1").status is Status.OK
        assert session.execute("def f(:").status is Status.ERROR
        assert session.execute("bytearray(1 << 40)").status is Status.MEMORY
        assert session.execute("print('y' * 10)").stdout == "yyyyyyyyyy\n"
        exited = session.execute("print('bye'); sys.exit(3)")
        assert (exited.status, exited.stdout, exited.exit_code) == (Status.ERROR, "bye\n", 3)
        after = session.execute("print(x)")
        if rewindable:
            assert (after.status, after.stdout) == (Status.OK, "1\n")
        else:
            assert after.status is Status.INFRA
            assert "the dialogue is over" in after.error


@pytest.mark.parametrize(
    ("code", "status", "signal"),
    [
        ("import os; os.kill(os.getpid(), 9)", Status.ERROR, 9),
        ("import os; os._exit(5)", Status.ERROR, None),
        ("while True: pass", Status.TIMEOUT, 9),
        ("import ctypes; ctypes.string_at(0)", Status.ERROR, 11),
    ],
)
def test_a_block_that_dies_leaves_the_state_before_it(
    sandbox: NativeSandbox, code: str, status: Status, signal: int | None
) -> None:
    with sandbox.session(ExecutionRequest("", timeout_s=60), rewindable=True) as session:
        session.execute("x = 'kept'")
        died = session.execute("x = 'lost'\n" + code, timeout_s=3)
        assert (died.status, died.signal) == (status, signal)
        assert session.execute("print(x)").stdout == "kept\n"


def test_rewinding(sandbox: NativeSandbox) -> None:
    with sandbox.session(rewindable=True) as session:
        for i in range(5):
            session.execute(f"x = {i}")
        session.rewind()
        assert session.execute("print(x)").stdout == "3\n"
        session.rewind(3)  # the print, x = 3, x = 2
        assert session.execute("print(x)").stdout == "1\n"
        with pytest.raises(ValueError, match="blocks is 9, expected at most 3"):
            session.rewind(9)
        session.rewind(3)
        assert "NameError" in session.execute("x").stderr


def test_random_numbers_go_on_where_they_were(sandbox: NativeSandbox) -> None:
    """A fork would be reseeded, but to the session there was none."""
    draw = "print(random.random())"
    expected = sandbox.execute(f"import random; random.seed(1); {draw}; {draw}").stdout
    with sandbox.session(rewindable=True) as session:
        session.execute("import random; random.seed(1)")
        first = session.execute(draw).stdout
        assert first + session.execute(draw).stdout == expected
        session.rewind(2)
        assert session.execute(draw).stdout == first


def test_sessions_do_not_take_slots_while_idle() -> None:
    with NativeSandbox(slots=1) as sandbox:
        sessions = [sandbox.session() for _ in range(4)]
        for i, session in enumerate(sessions):
            session.execute(f"x = {i}")
        assert sandbox.execute("print('free')").stdout == "free\n"
        shown = [session.execute("print(x)").stdout for session in sessions]
        assert shown == ["0\n", "1\n", "2\n", "3\n"]
        for session in sessions:
            session.close()


def test_number_and_life_are_limited() -> None:
    with NativeSandbox(slots=1, max_dialogues=2) as sandbox:
        first, second = sandbox.session(life_s=0.3), sandbox.session()
        with pytest.raises(SandboxError, match="2 dialogues are open, the most at a time"):
            sandbox.open()
        first.execute("x = 1")
        time.sleep(0.6)
        over = first.execute("print(x)")
        assert (over.status, "life" in over.error) == (Status.INFRA, True)
        first.close()
        sandbox.open().close()
        second.close()


def test_a_time_limit_ends_a_session_that_keeps_no_states(sandbox: NativeSandbox) -> None:
    with sandbox.session() as session:
        session.execute("x = 1")
        assert session.execute("while True: pass", timeout_s=1).status is Status.TIMEOUT
        assert session.execute("x").status is Status.INFRA
        with pytest.raises(SandboxError, match="keeps no states"):
            session.rewind()


def test_forged_answers_harm_only_their_session(sandbox: NativeSandbox) -> None:
    code = """
import os, socket
for text in (b'x', b'[]', b'["block", 0, false]', b'[' * 5000, b'["rewound", 1]', b'{}', b'\\xff'):
    socket.socket(fileno=os.dup(3)).send(text)
"""
    for rewindable in (False, True):
        with sandbox.session(rewindable=rewindable) as session:
            for block in itertools.repeat(code, 3):
                result = session.execute(block)
                # What comes between two blocks, as the later ones may, ends the session.
                assert result.status in (Status.OK, Status.ERROR) or (
                    "it spoke without being asked" in result.error
                ), result
            session.execute("import os; os.close(3)")
    assert sandbox.execute("print(1)").stdout == "1\n"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=5),
    max_leaves=8,
)
_ANSWERS = st.binary(max_size=100) | st.tuples(
    st.sampled_from(["block", "gone", "refused", "unknown"]), _JSON, st.booleans() | _JSON, _JSON
).flatmap(lambda parts: st.integers(1, 4).map(lambda length: json.dumps(parts[:length]).encode()))


@given(_ANSWERS)
@example(b'["gone", 127, false]')  # of a process that is stopped, not over
@example(b'["gone", %d, true]' % 10**30)
@example(b'["block", 0, false, %d]' % 10**400)
@example(b'["block", 0, false, NaN]')
@example(b'["block", -3, false, 0.5]')
def test_no_answer_makes_a_session_raise(reply: bytes) -> None:
    done = (1, "ok", b"", b"", -1, 0, 0.1, 0.0, 0, False, {}, reply, "")
    result, _ = block_result(done)
    assert result.exit_code is None or 0 <= result.exit_code < 256
    assert 0 <= result.cpu_s < math.inf
    assert result.signal is None or 0 < result.signal < 128


@pytest.mark.parametrize("life_s", [0, -1.0, 1e300, float("inf"), float("nan")])
def test_senseless_lives_are_refused(sandbox: NativeSandbox, life_s: float) -> None:
    for request in (ExecutionRequest(""), ExecutionRequest("", cpu_s=1)):
        with pytest.raises(ValueError, match=r"life_s is .*, expected > 0 and at most"):
            sandbox.session(request, life_s=life_s)


def test_async_sessions(sandbox: NativeSandbox) -> None:
    async def main() -> list[str]:
        async def one(n: int) -> str:
            with sandbox.session(rewindable=True) as session:
                await session.submit(f"x = {n}")
                await session.submit("x += 100")
                await session.arewind()
                return (await session.submit("print(x)")).stdout

        return await asyncio.gather(*map(one, range(6)))

    assert asyncio.run(main()) == [f"{n}\n" for n in range(6)]
