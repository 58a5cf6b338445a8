"""CPU time and memory of this process and everything below it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from thor_fast.errors import SandboxError

__all__ = ["CpuClock", "Process", "cpu_clock", "descendants", "stat_fields"]

_CGROUPS = Path("/sys/fs/cgroup")
_ENDING_S = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuClock:
    """``read`` gives CPU seconds of this process and all its descendants, dead ones included."""

    method: str
    read: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Process:
    """One descendant. ``pss_bytes``: its share of the memory it shares; ``None``: not readable."""

    pid: int
    name: str
    pss_bytes: int | None


@contextmanager
def cpu_clock() -> Iterator[CpuClock]:
    """The most exact clock the host grants.

    A control group of our own counts everything that ever ran in it. Where none can be made, what
    /proc says of living processes and of the children they waited for is added up: that misses
    processes nobody waited for, as are those killed with their PID namespace.
    """
    for place, version, read in _groups():
        own = place / f"sandbox-latency-{os.getpid()}"
        if not _enter(own):
            continue
        try:
            yield CpuClock(f"control group ({version})", lambda: read(own))  # noqa: B023
        finally:
            (place / "cgroup.procs").write_text(str(os.getpid()))
            _remove(own)
        return
    yield CpuClock("/proc (processes that nobody waited for are missing)", _tree_seconds)


def _enter(group: Path) -> bool:
    """Make a group and move this process there; whether the host let us."""
    try:
        group.mkdir()
    except OSError:
        return False
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        group.rmdir()
        return False
    return True


def _remove(group: Path) -> None:
    """Remove a group once what was killed in it has ended; ``SandboxError`` if it does not end."""
    deadline = time.monotonic() + _ENDING_S
    while True:
        try:
            group.rmdir()
        except OSError as error:
            if time.monotonic() > deadline:
                left = (group / "cgroup.procs").read_text().split()
                raise SandboxError(
                    f"{group}: {error}; processes {left} are left {_ENDING_S:g} s after every "
                    "backend was closed, expected none"
                ) from None
            time.sleep(0.05)
        else:
            return


def _groups() -> Iterator[tuple[Path, str, Callable[[Path], float]]]:
    """Our control group in each hierarchy that counts CPU time, and how to read it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpuacct" in controllers.split(","):
            yield _CGROUPS / controllers / path.lstrip("/"), "v1", _read_v1
        elif not controllers:
            for root in (_CGROUPS, _CGROUPS / "unified"):
                if (root / "cgroup.procs").exists():
                    yield root / path.lstrip("/"), "v2", _read_v2


def _read_v1(group: Path) -> float:
    return int((group / "cpuacct.usage").read_text()) / 1e9


def _read_v2(group: Path) -> float:
    fields = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    return int(fields["usage_usec"]) / 1e6


def _tree_seconds() -> float:
    ticks = 0
    for fields in (stat_fields(pid) for pid in (os.getpid(), *_below())):
        # utime, stime, and those of children that were waited for: fields 14 to 17 of proc(5)
        ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def descendants() -> list[Process]:
    """All living processes below this one, by pid."""
    found = []
    for pid in sorted(_below()):
        with suppress(OSError):  # it ended meanwhile
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            found.append(Process(pid, name, _pss(pid)))
    return found


def _below() -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = stat_fields(int(entry.name))
            if fields:
                parents[int(entry.name)] = int(fields[1])
    below: set[int] = set()
    frontier = {os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        below |= frontier
    return below


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty if there is no such process."""
    try:
        # The second field, the name, may hold anything, spaces and parentheses included.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
    return kib[0] << 10 if kib else 0
