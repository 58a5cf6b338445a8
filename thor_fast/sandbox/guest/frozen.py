"""The deterministic option: the same block with the same seed and time gives the same output.

Loaded from its file inside the guest interpreter: the standard library only.

Random numbers, all from ``seed``:

- ``random`` and ``numpy.random`` (legacy functions) are as after ``random.seed(seed)`` and
  ``numpy.random.seed(seed % 2**32)``, whether imported before or after; so is sympy's generator.
- What asks the system for entropy gets it from a stream of its own: ``os.urandom``,
  ``os.getrandom``, ``secrets``, ``random.Random()``, ``random.SystemRandom``, ``random.seed()``,
  ``numpy.random.default_rng()``, ``uuid.uuid1`` and ``uuid4``, names of ``tempfile``.
- A child by ``os.fork`` or ``multiprocessing`` continues ``random`` and that stream with numbers
  that follow from the seed and from its place among the forks.

Clocks: the first reading gives ``now``; each reading moves all clocks on by one microsecond, so
that loops that wait for a time end. ``time.sleep``, and waits with a timeout that expires
(``Condition``, ``Event``, ``Queue``, ``Thread.join``, ``selectors`` and so ``asyncio``), take as
long as ever, and move the clocks on by their nominal length; nothing else does. ``monotonic`` and
``perf_counter`` start at 1000 s, CPU times at 0 s, and those do not move while waiting.
Covered: the clocks of ``time``, its functions that take the current time by default,
``datetime.now``, ``utcnow``, ``today`` and ``date.today``.

Not covered: addresses (``id``, default ``repr``, order of a set of objects that hash by address),
the hash seed (fixed where the interpreter starts), the order in which threads and processes run,
and so which of them gets which number; time of files; ``os.times``, ``resource``,
``numpy.datetime64("now")``, timers of ``signal``, ``ssl.RAND_bytes``; libraries that kept a
clock's function when they were imported earlier; fresh interpreters in child processes. Code that
repeats work until it has taken long enough, as ``timeit``'s ``autorange``, runs into its limit.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import os
import random
import sys
from typing import TYPE_CHECKING, Any

from . import forking
from .clock import Clock, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType


def make_deterministic(seed: int, now: float) -> None:
    """Make this process deterministic; once, before the block runs.

    Args:
        seed: of all random numbers; any integer.
        now: seconds since the epoch, UTC, that the first reading of a clock gives.
    """
    clock = Clock(round(now * 1e9))
    clock.install()
    entropy = _Entropy(seed)
    entropy.install()
    os.register_at_fork(before=entropy.count_child, after_in_child=entropy.reseed_child)
    os.register_at_fork(after_in_child=clock.renew_lock)
    actions: dict[str, Callable[[Any], object]] = {
        "numpy.random": lambda module: module.seed(seed % 2**32),
        "selectors": clock.take_over_selectors,
        "sympy.core.random": lambda module: module.seed(seed),
        "uuid": entropy.take_over_uuid1,
    }
    for name, act in actions.items():
        if name in sys.modules:
            act(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(actions, entropy))


class _AfterImport:
    """A finder of modules that need something done right after they have been executed.

    What they draw while they are imported is given back, so that it makes no difference whether
    they were imported before.
    """

    def __init__(self, actions: dict[str, Callable[[Any], object]], entropy: _Entropy):
        self._actions = actions
        self._entropy = entropy

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        act = self._actions.get(name)
        if act is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                drawn = self._entropy.mark()
                execute(module)
                self._entropy.return_to(drawn)
                act(module)

            loader.exec_module = execute_and_act
        return spec


class _Entropy:
    """A stream of bytes in place of the system's, and what reads it."""

    def __init__(self, seed: int):
        self._seed = seed
        self._lineage = ""  # the numbers of the forks that led to this process
        self._children = itertools.count(1)
        self._child = 0
        self._stream = random.Random(f"entropy {seed}")  # noqa: S311
        self._set_seed = random.Random.seed

    def install(self) -> None:
        """Replace the system's entropy, then seed ``random``."""

        def seed(self: random.Random, a: Any = None, version: int = 2) -> None:
            entropy._set_seed(self, entropy._number() if a is None else a, version)

        entropy, names = self, {"urandom": self.urandom, "getrandom": self._getrandom}
        for name, read in names.items():
            replace(os, name, read)
        module: Any = random
        module._urandom = os.urandom  # noqa: SLF001  (what SystemRandom and secrets read)
        module.Random.seed = seed
        module.seed = module._inst.seed  # noqa: SLF001
        random.seed(self._seed)

    def urandom(self, size: int, /) -> bytes:
        if size < 0:
            raise ValueError("negative argument not allowed")
        return self._stream.randbytes(size)

    def mark(self) -> Any:
        return self._stream.getstate()

    def return_to(self, mark: Any) -> None:
        self._stream.setstate(mark)

    def take_over_uuid1(self, module: Any) -> None:
        """Leave ``uuid1`` the clock, a node from the stream, and ``random``, not the system."""
        module._generate_time_safe = None  # noqa: SLF001
        module._node = int.from_bytes(self.urandom(6), "big") | 1 << 40  # noqa: SLF001

    def count_child(self) -> None:
        if forking.unnoticed:
            return
        self._child = next(self._children)

    def reseed_child(self) -> None:
        if forking.unnoticed:
            return
        self._lineage += f".{self._child}"
        self._children = itertools.count(1)
        self._stream.seed(f"entropy {self._seed}{self._lineage}")
        random.seed(f"{self._seed}{self._lineage}")

    def _getrandom(self, size: int, flags: int = 0) -> bytes:
        return self.urandom(size)

    def _number(self) -> int:
        return int.from_bytes(self.urandom(32), "big")
