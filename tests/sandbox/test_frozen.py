"""The deterministic option: what is told twice the same, in processes of their own."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from . import statement_guest

GUEST = str(Path(__file__).parents[2] / "thor_fast" / "sandbox" / "guest")
NOW = 1_700_000_000.5
START = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import statement_guest
EARLY
statement_guest.load({GUEST!r}, "frozen").make_deterministic(SEED, {NOW})
"""
EARLY = (
    "import numpy.random, uuid, queue, selectors, subprocess, asyncio, concurrent.futures, "
    "tempfile, timeit, sched, logging, random"
)


def run(code: str, seed: int = 42, early: str = "") -> str:
    """Run ``code`` in a deterministic process, after importing ``early`` before; its stdout."""
    start = START.replace("SEED", str(seed)).replace("EARLY", early)
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-W", "error", "-c", start + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={"TZ": "UTC", "PYTHONHASHSEED": "0"},
    )
    assert done.stderr == ""
    return done.stdout


RANDOM = """
    import os, random, secrets, tempfile, uuid
    print(random.random(), random.Random().random(), random.SystemRandom().random())
    print(os.urandom(5), os.getrandom(3), secrets.token_hex(4), secrets.randbelow(10**9))
    print(uuid.uuid1(), uuid.uuid4(), uuid.getnode(), tempfile.mktemp())
    import numpy as np
    print(np.random.rand(), np.random.default_rng().random(), np.random.RandomState().rand())
    random.seed(); np.random.seed()
    print(random.random(), np.random.rand())
    pid = os.fork()
    print(random.random(), os.urandom(4), flush=True)
    if pid == 0:
        if os.fork() == 0:
            print(random.random(), flush=True)
            os._exit(0)
        os.wait()
        os._exit(0)
    os.wait()
    if os.fork() == 0:
        print(random.random(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_random_numbers_follow_from_the_seed() -> None:
    first, second, early, other = run(RANDOM), run(RANDOM), run(RANDOM, early=EARLY), run(RANDOM, 1)
    # The first fork's two lines come in either order.
    assert sorted(first.splitlines()) == sorted(second.splitlines())
    assert sorted(first.splitlines()) == sorted(early.splitlines())
    assert not set(first.split()) & set(other.split())
    assert len(set(first.splitlines())) == 9


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, -3])
def test_random_numbers_are_those_of_a_user_who_seeds(seed: int) -> None:
    code = """
        import random
        import numpy as np
        print(random.random(), np.random.rand())
        random.seed({0}); np.random.seed({0} % 2**32)
        print(random.random(), np.random.rand())
    """
    for early in ("", EARLY):
        seen, expected = run(code.format(seed), seed, early).splitlines()
        assert seen == expected


def test_generator_of_sympy() -> None:
    pytest.importorskip("sympy")
    code = "import sympy.core.random as r; print(r.random(), r.sample([1, 2, 3, 4, 5], 3))"
    assert run(code) == run(code, early="import sympy") != run(code, 7)


def test_urandom_refuses_what_it_always_did() -> None:
    code = """
        import os
        for size in (-1, "x", 1.5):
            try:
                os.urandom(size)
            except (TypeError, ValueError) as error:
                print(type(error).__name__)
    """
    assert run(code).split() == ["ValueError", "TypeError", "TypeError"]


def test_first_reading_is_now_and_each_moves_on_by_a_microsecond() -> None:
    code = """
        import time, datetime as dt
        print(time.time_ns(), time.time(), dt.datetime.now(), dt.datetime.now(dt.timezone.utc))
        print(dt.date.today(), dt.datetime.today(), time.time_ns())
        print(time.monotonic(), time.perf_counter_ns(), time.clock_gettime(time.CLOCK_MONOTONIC))
        print(time.process_time_ns(), time.thread_time(), time.clock_gettime_ns(0))
    """
    day = dt.datetime.fromtimestamp(NOW, dt.UTC).strftime("%Y-%m-%d")
    assert run(code) == textwrap.dedent(f"""\
        1700000000500000000 1700000000.500001 {day} 22:13:20.500002 {day} 22:13:20.500003+00:00
        {day} {day} 22:13:20.500005 1700000000500006000
        1000.000007 1000000008000 1000.000009
        10000 1.1e-05 1700000000500012000
    """)


def test_defaults_of_time_functions() -> None:
    code = f"""
        import time
        t = {int(NOW)}
        print(time.localtime() == time.localtime(t), time.gmtime() == time.gmtime(t))
        print(time.ctime() == time.ctime(t) == time.asctime(), time.strftime('%S'))
        print(time.localtime(0).tm_year, time.gmtime(None) == time.gmtime(t))
        print(time.strftime('%Y', time.gmtime(0)), time.asctime(time.gmtime(0)))
    """
    assert run(code) == ("True True\nTrue 20\n1970 True\n1970 Thu Jan  1 00:00:00 1970\n")


def test_datetime_is_the_same_type_as_ever() -> None:
    code = """
        import datetime, pickle, copy
        class Own(datetime.datetime):
            pass
        now = datetime.datetime.now()
        print(type(now) is datetime.datetime, isinstance(now, datetime.date), repr(now))
        print(pickle.loads(pickle.dumps(now)) == copy.copy(now) == now, type(Own.now()).__name__)
        try:
            datetime.datetime.now("x")
        except TypeError as error:
            print(error)
    """
    seen = run(code).splitlines()
    assert seen[0] == "True True datetime.datetime(2023, 11, 14, 22, 13, 20, 500000)"
    assert seen[1] == "True Own"
    with pytest.raises(TypeError) as caught:
        dt.datetime.now("x")  # type: ignore[arg-type]
    assert seen[2] == str(caught.value)


def test_utcnow_warns_where_it_did() -> None:
    code = """
        import datetime, warnings
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            print(datetime.datetime.utcnow())
        for warning in seen:
            print(warning.category.__name__, warning.filename, warning.message)
    """
    seen = run(code).splitlines()
    assert seen[0] == "2023-11-14 22:13:20.500000"
    if sys.version_info < (3, 12):
        assert seen[1:] == []
    else:
        with pytest.warns(DeprecationWarning, match="utcnow") as caught:
            dt.datetime.utcnow()
        assert seen[1:] == [f"DeprecationWarning <string> {caught[0].message}"]


@pytest.mark.parametrize("early", ["", EARLY])
def test_waits_move_the_clock_by_their_length(early: str) -> None:
    code = """
        import asyncio, concurrent.futures, queue, selectors, subprocess, threading, time
        def took(call, *args, **kwargs):
            begin = time.perf_counter()
            try:
                call(*args, **kwargs)
            except (TimeoutError, queue.Empty, subprocess.TimeoutExpired):
                pass
            print(round(time.perf_counter() - begin, 3))
        took(time.sleep, 0.05)
        took(threading.Event().wait, 0.06)
        took(queue.Queue().get, timeout=0.07)
        took(asyncio.run, asyncio.sleep(0.08))
        async def both():
            await asyncio.gather(asyncio.sleep(0.05), asyncio.sleep(0.09))
        took(asyncio.run, both())
        took(selectors.DefaultSelector().select, 0.1)
        end = threading.Event()
        thread = threading.Thread(target=end.wait)
        thread.start()
        took(thread.join, 0.11)
        end.set()
        took(thread.join, 60)
        end.clear()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            took(concurrent.futures.wait, [pool.submit(end.wait)], timeout=0.12)
            end.set()
        took(subprocess.run, ["sleep", "100"], timeout=0.13)
    """
    seen = [float(line) for line in run(code, early=early).split()]
    expected = [0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.0, 0.12, 0.13]
    # A process is waited for in steps.
    assert seen == pytest.approx(expected, abs=0.003)


def test_loop_that_waits_for_a_time_ends() -> None:
    code = """
        import time
        end, n = time.time() + 0.1, 0
        while time.time() < end:
            n += 1
        print(n)
    """
    assert int(run(code)) == pytest.approx(100_000, abs=2)


def test_clock_functions_behave_as_built_in_ones() -> None:
    code = """
        import multiprocessing, pickle, time
        class Timed:
            clock = time.perf_counter
        print(Timed().clock() > 0, time.time, pickle.loads(pickle.dumps(time.sleep)) is time.sleep)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(pool.map(time.sleep, [0.01]))
        import timeit
        print(timeit.timeit("1", number=3) < 1e-4)
    """
    assert run(code, early=EARLY) == "True <built-in function time> True\n[None]\nTrue\n"


def test_threads_see_time_only_move_forward() -> None:
    code = """
        import threading, time
        def read(out):
            seen = [time.monotonic_ns() for _ in range(20000)]
            out.append(seen == sorted(seen))
            time.sleep(0.01)
            out.append(time.monotonic_ns() >= seen[0] + 10_000_000)
        outs = [[] for _ in range(4)]
        threads = [threading.Thread(target=read, args=(out,)) for out in outs]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(outs == [[True, True]] * 4)
    """
    assert run(code) == "True\n"


def test_nothing_changes_where_it_is_not_asked_for() -> None:
    code = f"""
        import sys, time, datetime, os, random, threading
        before = [time.time, time.sleep, vars(datetime.datetime)["now"], os.urandom,
                  random.Random.seed, threading.Condition.wait, list(sys.meta_path)]
        sys.path.append({str(Path(__file__).parent)!r})
        import statement_guest
        statement_guest.load({GUEST!r}, "frozen")
        print(before == [time.time, time.sleep, vars(datetime.datetime)["now"], os.urandom,
                         random.Random.seed, threading.Condition.wait, list(sys.meta_path)])
    """
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"
    assert statement_guest.load(GUEST, "clock").Clock(0).wall_ns() == 0
