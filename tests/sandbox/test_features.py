"""What the native sandbox offers beyond the contract: order, files, determinism, tiers, size."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from thor_fast.errors import SandboxError
from thor_fast.sandbox import Determinism, ExecutionRequest, NativeSandbox, Status, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shared() -> Iterator[NativeSandbox]:
    with NativeSandbox(slots=2) as box:
        yield box


@pytest.fixture
def sandbox(shared: NativeSandbox) -> Iterator[NativeSandbox]:
    yield shared
    assert shared.execute("print('alive')").stdout == "alive\n"
    # A cancelled one is told so before it has been killed.
    deadline = time.monotonic() + 10
    while (busy := _busy(shared)) != (0, 0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert busy == (0, 0, 0)


def _busy(box: NativeSandbox) -> tuple[int, int, int]:
    stats = box.stats()
    return stats["queued"], stats["running"], stats["dialogues"]


@pytest.fixture
def single() -> Iterator[NativeSandbox]:
    with NativeSandbox(slots=1) as box:
        yield box


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# --- several at once -----------------------------------------------------------------------------


def test_as_completed_gives_the_fast_one_first(sandbox: NativeSandbox) -> None:
    slow = ExecutionRequest("import time; time.sleep(600)", timeout_s=600)
    results = sandbox.as_completed([slow, "print('fast')"])
    assert next(results)[0] == 1
    results.close()  # type: ignore[attr-defined]
    assert list(sandbox.as_completed([])) == []


def test_as_completed_takes_any_iterable_and_answers_each_once(sandbox: NativeSandbox) -> None:
    found = dict(sandbox.as_completed(f"print({i})" for i in range(100)))
    assert {i: r.stdout for i, r in found.items()} == {i: f"{i}\n" for i in range(100)}


def test_leaving_as_completed_early_kills_the_rest(sandbox: NativeSandbox) -> None:
    spin = ExecutionRequest("while True: pass", timeout_s=600)
    before = sandbox.stats()
    results = sandbox.as_completed(["print(1)", *[spin] * 20])
    assert next(results)[0] == 0
    results.close()  # type: ignore[attr-defined]
    after = sandbox.stats()
    assert (after["running"], after["queued"]) == (0, 0), "at once, not some time later"
    assert after["completed"] - before["completed"] == 21


def test_a_request_that_is_wrong_cancels_those_before_it(sandbox: NativeSandbox) -> None:
    spin = ExecutionRequest("while True: pass", timeout_s=600)
    with pytest.raises(ValueError, match="timeout_s is 0, expected > 0"):
        sandbox.execute_batch([spin, spin, spin, ExecutionRequest("", timeout_s=0)])
    assert sandbox.stats()["running"] == 0


async def _running(sandbox: NativeSandbox, snippets: int) -> None:
    while sandbox.stats()["running"] < snippets:  # noqa: ASYNC110  (there is no event for it)
        await asyncio.sleep(0.01)


async def test_the_highest_priority_goes_first_and_equals_keep_their_order(
    single: NativeSandbox,
) -> None:
    order: list[int] = []

    async def run(index: int, priority: int) -> None:
        await single.submit(ExecutionRequest("pass", priority=priority))
        order.append(index)

    spin = ExecutionRequest("while True: pass", timeout_s=600, priority=2**31 - 1)
    # The one no longer keeps its slot, the other does: so all else goes one at a time.
    aged, blocker = (asyncio.create_task(single.submit(spin)) for _ in range(2))
    await _running(single, 2)
    priorities = [0, -5, 7, 0, 7, 2**31 - 1, -(2**31) + 1]
    tasks = [asyncio.create_task(run(i, p)) for i, p in enumerate(priorities)]
    await asyncio.sleep(0)
    assert single.stats()["queued"] == len(priorities)
    blocker.cancel()
    await asyncio.gather(*tasks)
    aged.cancel()
    assert order == sorted(range(len(priorities)), key=lambda i: (-priorities[i], i))


async def test_jails_that_long_snippets_needed_rest_afterwards(single: NativeSandbox) -> None:
    which_jail = "import os\nprint(os.readlink('/proc/self/ns/net'))"
    spin = ExecutionRequest("while True: pass", timeout_s=600)
    endless = asyncio.create_task(single.submit(spin))
    await _running(single, 1)
    await single.submit(which_jail)  # beside it, so in another
    assert single.stats()["jails"] == 2
    endless.cancel()
    results = await asyncio.gather(*(single.submit(which_jail) for _ in range(20)))
    assert [result.stdout[:5] for result in results] == ["net:["] * 20
    assert len({result.stdout for result in results}) == 1


@pytest.mark.parametrize("priority", [2**31, 1.0, True, None])
def test_a_priority_that_is_none_is_refused(sandbox: NativeSandbox, priority: object) -> None:
    request = ExecutionRequest("", priority=priority)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a whole number of 32 bits"):
        sandbox.execute(request)


async def test_cancelling_one_that_waits_never_runs_it(single: NativeSandbox) -> None:
    spin = ExecutionRequest("while True: pass", timeout_s=600)
    first, second, waits = (asyncio.create_task(single.submit(spin)) for _ in range(3))
    await _running(single, 2)
    assert single.stats()["queued"] == 1
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert [first.done(), second.done()] == [False, False]
    first.cancel()
    second.cancel()
    assert (await single.submit("print(1)")).stdout == "1\n"


async def test_cancelled_at_any_moment_every_slot_comes_back(sandbox: NativeSandbox) -> None:
    for n in range(40):
        task = asyncio.create_task(sandbox.submit(ExecutionRequest("while 1: 0", timeout_s=600)))
        await asyncio.sleep(0.001 * (n % 10))
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    results = await asyncio.gather(*(sandbox.submit("print(1)") for _ in range(10)))
    assert {r.stdout for r in results} == {"1\n"}


async def test_a_full_queue_refuses_the_one_and_keeps_the_others() -> None:
    with NativeSandbox(slots=1, queue_capacity=3) as sandbox:
        spin = ExecutionRequest("while True: pass", timeout_s=600)
        running = asyncio.create_task(sandbox.submit(spin))
        while not sandbox.stats()["running"]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        waiting = [asyncio.create_task(sandbox.submit(f"print({i})")) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(SandboxError, match="queue holds 3 requests"):
            await sandbox.submit("print('one too many')")
        running.cancel()
        assert [(await task).stdout for task in waiting] == ["0\n", "1\n", "2\n"]


async def test_five_thousand_in_flight_from_one_loop(sandbox: NativeSandbox) -> None:
    descriptors = open_descriptors()
    tasks = [asyncio.create_task(sandbox.submit(f"print({i})")) for i in range(5000)]
    await asyncio.sleep(0)
    assert open_descriptors() < descriptors + 50, "waiting costs no descriptor"
    results = await asyncio.gather(*tasks)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(5000)]


def test_loops_threads_and_iterators_at_once(sandbox: NativeSandbox) -> None:
    outputs: list[list[str]] = []

    async def gather(n: int) -> list[str]:
        results = await asyncio.gather(*(sandbox.submit(f"print({n})") for _ in range(20)))
        return [r.stdout for r in results]

    def loop(n: int) -> None:
        outputs.append(asyncio.run(gather(n)))

    def batch(n: int) -> None:
        outputs.append([r.stdout for r in sandbox.execute_batch([f"print({n})"] * 20)])

    def iterate(n: int) -> None:
        outputs.append([r.stdout for _, r in sandbox.as_completed([f"print({n})"] * 20)])

    threads = [
        threading.Thread(target=work, args=(n,))
        for n, work in enumerate([loop, batch, iterate] * 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert sorted(outputs) == [[f"{n}\n"] * 20 for n in range(9)]


def test_ctrl_c_during_execute_frees_the_slots() -> None:
    script = """
import os, signal, threading, time
from thor_fast.sandbox import ExecutionRequest, NativeSandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where our starter ignores it

def interrupt(running, queued):
    while [sandbox.stats()[name] for name in ("running", "queued")] != [running, queued]:
        time.sleep(0.01)
    time.sleep(0.2)  # submitted is not yet waited for
    os.kill(os.getpid(), signal.SIGINT)

with NativeSandbox(slots=2) as sandbox:
    spin = ExecutionRequest("while True: pass", timeout_s=600)
    for count, expected in ((1, (1, 0)), (20, (2, 18))):
        try:
            threading.Thread(target=interrupt, args=expected).start()
            sandbox.execute_batch([spin] * count)
        except KeyboardInterrupt:
            stats = sandbox.stats()
            print(stats["running"], stats["queued"], sandbox.execute("print('next')").stdout)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "0 0 next\n\n" * 2), done.stderr


# --- files out -----------------------------------------------------------------------------------


def test_collect_gives_regular_files_and_nothing_else(sandbox: NativeSandbox) -> None:
    code = """
import os, socket
open('a.bin', 'wb').write(b'\\xff\\0' * 1000)
os.makedirs('deep/er')
open('deep/er/b.txt', 'w').write('b')
open('empty', 'w').close()
os.symlink('a.bin', 'link'); os.symlink('/usr/bin/env', 'out'); os.symlink('deep', 'side')
os.mkfifo('fifo')
socket.socket(socket.AF_UNIX).bind('socket')
open('unread', 'w').write('x'); os.chmod('unread', 0)
"""
    wanted = ("a.bin", "deep/er/b.txt", "empty", "link", "out", "side/er/b.txt", "fifo")
    request = ExecutionRequest(code, collect=(*wanted, "socket", "deep", "missing"))
    result = sandbox.execute(request)
    assert result.status is Status.OK, result.stderr
    expected = {"a.bin": b"\xff\0" * 1000, "deep/er/b.txt": b"b", "empty": b""}
    assert result.files == expected


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("while True: pass", Status.TIMEOUT),
        ("import os; os.kill(os.getpid(), 9)", Status.ERROR),
        ("1 / 0", Status.ERROR),
        ("bytearray(1 << 40)", Status.MEMORY),
    ],
)
def test_files_are_collected_however_it_ended(
    sandbox: NativeSandbox, ending: str, status: Status
) -> None:
    code = f"open('a', 'w').write('kept')\n{ending}"
    result = sandbox.execute(ExecutionRequest(code, collect=("a", "b"), timeout_s=3))
    assert (result.status, result.files) == (status, {"a": b"kept"})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "", "a\0b", "a/../../b"])
def test_paths_to_collect_that_escape_are_refused(sandbox: NativeSandbox, path: str) -> None:
    with pytest.raises(ValueError, match="expected a relative one"):
        sandbox.execute(ExecutionRequest("", collect=(path,)))


def test_too_many_paths_to_collect_are_refused(sandbox: NativeSandbox) -> None:
    with pytest.raises(ValueError, match=r"33 paths to collect .* expected at most 32"):
        sandbox.execute(ExecutionRequest("", collect=tuple(f"f{i}" for i in range(33))))
    most = tuple(f"f{i}" for i in range(32))
    code = "for i in range(32): open(f'f{i}', 'w').write(str(i))"
    found = sandbox.execute(ExecutionRequest(code, collect=most)).files
    assert found == {f"f{i}": str(i).encode() for i in range(32)}


# --- determinism ---------------------------------------------------------------------------------

CHANCE = """
import datetime, os, random, secrets, tempfile, time, uuid
print(hash('text'), list({'a', 'b', 'c', 'd', 'e'}), random.random(), random.sample(range(99), 5))
print(uuid.uuid4(), os.urandom(4), secrets.token_hex(4), time.time(), datetime.datetime.now())
time.sleep(0.01)
print(time.time(), time.perf_counter(), id(None) > 0)
"""
CHANCE_OF_NUMPY = "import numpy as np\nprint(np.random.rand(2), np.random.default_rng().random())"


@pytest.mark.parametrize("code", [CHANCE, CHANCE_OF_NUMPY])
def test_the_same_code_gives_the_same_output(code: str) -> None:
    outputs = []
    for seed in (1, 1, 2):
        with NativeSandbox(slots=1, deterministic=Determinism(seed=seed)) as sandbox:
            results = sandbox.execute_batch([code] * 2)
            assert [r.status for r in results] == [Status.OK] * 2, results
            assert results[0].stdout == results[1].stdout
            outputs.append(results[0].stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_now_is_the_first_reading_of_the_clock() -> None:
    with NativeSandbox(slots=1, deterministic=Determinism(now=86_400.0)) as sandbox:
        shown = sandbox.execute(
            "import datetime; print(datetime.datetime.now(datetime.UTC).date())"
        )
    assert shown.stdout == "1970-01-02\n"


# --- tiers ---------------------------------------------------------------------------------------


def test_imports_choose_the_tier_and_a_wrong_guess_is_still_right(sandbox: NativeSandbox) -> None:
    pytest.importorskip("numpy")
    sandbox.warm_up("numpy")
    show = "import sys; print('numpy' in sys.modules)\n"
    assert sandbox.execute(show).stdout == "False\n"
    assert sandbox.execute(f"{show}import numpy").stdout == "True\n"
    hidden = "name = 'num' + 'py'\nmodule = __import__(name)\nprint(module.arange(3).sum())"
    assert sandbox.execute(show + hidden).stdout == "False\n3\n"
    assert sandbox.execute(f"{show}# import numpy").stdout == "True\n"


def test_warm_up_starts_templates_and_no_more() -> None:
    with NativeSandbox(slots=1) as sandbox:
        assert sandbox.stats()["template_starts"] == 1
        sandbox.warm_up()
        assert sandbox.stats()["template_starts"] == len(sandbox.tiers)
        sandbox.warm_up(sandbox.tiers[-1].name)
        assert sandbox.stats()["template_starts"] == len(sandbox.tiers)


def test_an_unknown_tier_is_refused(sandbox: NativeSandbox) -> None:
    with pytest.raises(ValueError, match="tier is 'hot', expected one of bare"):
        sandbox.warm_up("bare", "hot")


def test_a_tier_that_cannot_start_is_told_by_warm_up_and_replaced_for_snippets() -> None:
    tiers = [Tier("bare", (), ()), Tier("broken", ("no_such_module",), ())]
    with NativeSandbox(slots=1, tiers=tiers) as sandbox:
        served = sandbox.execute(
            "try:\n    import no_such_module\nexcept ImportError:\n    print(1)"
        )
        assert (served.status, served.stdout) == (Status.OK, "1\n")
        with pytest.raises(SandboxError, match="'broken' did not start: it cannot import no_such"):
            sandbox.warm_up("broken")


def test_stats_count(single: NativeSandbox) -> None:
    first = single.stats()
    assert (first["submitted"], first["completed"], first["jails"]) == (0, 0, 1)
    single.execute_batch(["print(1)"] * 5)
    single.execute("open('x', 'w')")
    after = single.stats()
    assert (after["submitted"], after["completed"], after["jails_discarded"]) == (6, 6, 1)
    assert (after["queued"], after["running"], after["dialogues"]) == (0, 0, 0)
    with single.session() as session:
        session.execute("x = 1")
        assert single.stats()["dialogues"] == 1


# --- text and size -------------------------------------------------------------------------------


def test_large_input_output_and_source(sandbox: NativeSandbox) -> None:
    echo = "import sys; sys.stdout.write(sys.stdin.read())"
    text = "\u20ac" * 4_000_000
    request = ExecutionRequest(echo, stdin=text, max_output_bytes=16 << 20, timeout_s=60)
    assert sandbox.execute(request).stdout == text
    source = f"x = {'a' * 5_000_000!r}\nprint(len(x))"
    assert sandbox.execute(ExecutionRequest(source, timeout_s=60)).stdout == "5000000\n"


@pytest.mark.parametrize("code", ["", "\n", "# only\n", " ", "'''x'''", "\f\n", "\r\n"])
def test_source_without_a_statement_passes(sandbox: NativeSandbox, code: str) -> None:
    result = sandbox.execute(code)
    assert (result.status, result.stdout, result.stderr) == (Status.OK, "", "")


def test_keyboard_interrupt_is_the_snippets_own(sandbox: NativeSandbox) -> None:
    raised = sandbox.execute("print('a')\nraise KeyboardInterrupt")
    assert (raised.status, raised.stdout, raised.exit_code) == (Status.ERROR, "a\n", 1)
    assert raised.stderr.endswith("KeyboardInterrupt\n")
    sent = sandbox.execute("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('b')")
    assert (sent.status, sent.stdout) == (Status.ERROR, "")
    assert "KeyboardInterrupt" in sent.stderr
    caught = "import os\ntry:\n    os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt:\n    print(1)"
    assert sandbox.execute(caught).stdout == "1\n"


def test_a_signal_to_the_owner_is_not_the_snippets(sandbox: NativeSandbox) -> None:
    """Ctrl-C goes to a terminal's whole foreground group; jails are sessions of their own."""
    handled = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))

    def strike() -> None:
        while not sandbox.stats()["running"]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    try:
        striker = threading.Thread(target=strike)
        striker.start()
        result = sandbox.execute("import time; time.sleep(0.6); print('done')")
        striker.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert (result.status, result.stdout, handled) == (Status.OK, "done\n", [1])
