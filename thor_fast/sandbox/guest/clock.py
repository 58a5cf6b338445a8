"""A clock that stands still but for readings and waits, in place of the system's.

What is covered is listed in ``_frozen``.
"""

from __future__ import annotations

import datetime as dt
import functools
import gc
import itertools
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

_TICK_NS = 1_000
_UTCNOW_IS_DEPRECATED = (  # the interpreter's own words
    "datetime.datetime.utcnow() is deprecated and scheduled for removal in a future version. "
    "Use timezone-aware objects to represent datetimes in UTC: datetime.datetime.now(datetime.UTC)."
)
_UPTIME_NS = 1_000 * 10**9  # some code takes a time of 0 for "never"


class _Function:
    """Stands in for a built-in function: no descriptor, and pickled by its name."""

    def __init__(self, module: ModuleType, name: str, call: Callable[..., Any]):
        self.__module__ = module.__name__
        self.__name__ = self.__qualname__ = name
        self.__doc__ = getattr(module, name).__doc__
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> str:
        return self.__name__

    def __repr__(self) -> str:
        return f"<built-in function {self.__name__}>"


def replace(module: ModuleType, name: str, call: Callable[..., Any]) -> None:
    """Put ``call`` in the place of a built-in function, and make it look like one."""
    setattr(module, name, _Function(module, name, call))


class Clock:
    """One count of readings and waits, from which every clock is told."""

    def __init__(self, start_ns: int):
        self._start_ns = start_ns
        self._ticks = itertools.count(0, _TICK_NS)  # atomic, unlike += from several threads
        self._waited_ns = 0
        self.renew_lock()
        self._sleep = time.sleep

    def renew_lock(self) -> None:
        """In a forked child: another thread of the parent may have held it."""
        self._lock = threading.RLock()

    def wall_ns(self) -> int:
        return self._start_ns + self._elapsed_ns()

    def steady_ns(self) -> int:
        return _UPTIME_NS + self._elapsed_ns()

    def cpu_ns(self) -> int:
        return next(self._ticks)

    def wall(self) -> float:
        return self.wall_ns() / 1e9

    def sleep(self, seconds: Any) -> None:
        begin_ns = self._elapsed_ns()
        self._sleep(seconds)
        self._move_to(begin_ns + round(float(seconds) * 1e9))

    def install(self) -> None:
        """Replace what reads a clock or waits for one."""
        kinds: dict[Callable[[], int], tuple[str, ...]] = {
            self.wall_ns: ("time",),
            self.steady_ns: ("monotonic", "perf_counter"),
            self.cpu_ns: ("process_time", "thread_time"),
        }
        for read_ns, names in kinds.items():
            for name in names:
                replace(time, f"{name}_ns", read_ns)
                replace(time, name, lambda read_ns=read_ns: read_ns() / 1e9)
        replace(time, "sleep", self.sleep)
        self._take_over_clock_gettime()
        self._take_over_time_defaults()
        self._take_over_datetime()
        for name, attribute in (("queue", "time"), ("subprocess", "_time"), ("threading", "_time")):
            if name in sys.modules:
                setattr(sys.modules[name], attribute, time.monotonic)
        for name in ("sched", "timeit"):  # they keep clocks as default arguments
            sys.modules.pop(name, None)
        self._count_wait(threading.Condition, "wait", lambda _, notified: not notified)
        self._count_wait(threading.Thread, "join", lambda thread, _: thread.is_alive())

    def take_over_selectors(self, module: ModuleType) -> None:
        for kind in (module.SelectSelector, module.PollSelector, module.EpollSelector):
            self._count_wait(kind, "select", lambda _, events: not events)

    def _count_wait(self, owner: type, name: str, has_expired: Callable[[Any, Any], bool]) -> None:
        """Let the clock move on by the timeout where a wait has used it up."""
        wait = getattr(owner, name)

        @functools.wraps(wait)
        def counted(waiter: Any, timeout: float | None = None) -> Any:
            if timeout is None:
                return wait(waiter)
            begin_ns = self._elapsed_ns()
            result = wait(waiter, timeout)
            if has_expired(waiter, result):
                self._move_to(begin_ns + round(timeout * 1e9))
            return result

        setattr(owner, name, counted)

    def _elapsed_ns(self) -> int:
        return self._waited_ns + next(self._ticks)

    def _move_to(self, due_ns: int) -> None:
        with self._lock:
            self._waited_ns += max(due_ns - self._elapsed_ns(), 0)

    def _take_over_clock_gettime(self) -> None:
        readers = {
            time.CLOCK_REALTIME: self.wall_ns,
            time.CLOCK_MONOTONIC: self.steady_ns,
            time.CLOCK_MONOTONIC_RAW: self.steady_ns,
            time.CLOCK_BOOTTIME: self.steady_ns,
            time.CLOCK_PROCESS_CPUTIME_ID: self.cpu_ns,
            time.CLOCK_THREAD_CPUTIME_ID: self.cpu_ns,
        }
        real_ns, real = time.clock_gettime_ns, time.clock_gettime
        replace(
            time, "clock_gettime_ns", lambda key: readers[key]() if key in readers else real_ns(key)
        )
        replace(
            time, "clock_gettime", lambda key: readers[key]() / 1e9 if key in readers else real(key)
        )

    def _take_over_time_defaults(self) -> None:
        for name in ("localtime", "gmtime", "ctime"):
            real = getattr(time, name)
            replace(
                time,
                name,
                lambda seconds=None, /, real=real: real(
                    self.wall() if seconds is None else seconds
                ),
            )
        asctime, strftime = time.asctime, time.strftime
        replace(time, "asctime", lambda *tm: asctime(*tm or (time.localtime(),)))
        replace(time, "strftime", lambda form, *tm: strftime(form, *tm or (time.localtime(),)))

    def _take_over_datetime(self) -> None:
        """Change the type in place: a stand-in would break ``type(x) is datetime`` and pickles.

        ``today`` reads ``time.time``. The dictionary of a built-in type is read-only except
        through the collector, and the interpreter caches what it has looked up in it.
        """

        def now(cls: Any, tz: Any = None) -> Any:
            return cls.fromtimestamp(self.wall(), tz)

        def utcnow(cls: Any) -> Any:
            if sys.version_info >= (3, 12):
                warnings.warn(_UTCNOW_IS_DEPRECATED, DeprecationWarning, stacklevel=2)
            return cls.fromtimestamp(self.wall(), dt.UTC).replace(tzinfo=None)

        (members,) = gc.get_referents(vars(dt.datetime))
        members["now"] = classmethod(now)
        members["utcnow"] = classmethod(utcnow)
        sys._clear_type_cache()  # noqa: SLF001
