"""What belongs to one owner of a sandbox, from outside it: processes, control groups, files."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "Process",
    "Roles",
    "assert_ended",
    "control_groups",
    "host_files",
    "is_alive",
    "is_guest",
    "mounts",
    "named",
    "processes_of",
    "roles",
]


@dataclass(frozen=True, slots=True)
class Process:
    """``started`` (in clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    parent: int
    started: int
    state: str


def _process(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended while we looked
        return None
    return Process(pid, int(stat[1]), int(stat[19]), stat[0])


def _all_processes() -> dict[int, Process]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {found.pid: found for found in map(_process, pids) if found is not None}


def processes_of(owner: int) -> set[Process]:
    """All below ``owner``, zombies too."""
    everything = _all_processes()
    found: set[int] = set()
    frontier = {owner}
    while frontier:
        frontier = {p.pid for p in everything.values() if p.parent in frontier}
        found |= frontier
    return {everything[pid] for pid in found}


def is_alive(process: Process) -> bool:
    """Also a zombie is: somebody has not waited for it."""
    now = _process(process.pid)
    return now is not None and now.started == process.started


def assert_ended(processes: set[Process], within_s: float = 60.0) -> None:
    """Polls, because the kernel tears namespaces down in its own time."""
    deadline = time.monotonic() + within_s
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [process for process in processes if is_alive(process)]


@dataclass(frozen=True, slots=True)
class Roles:
    """Pids of one sandbox's processes by what they do; ``children`` are parked or run a snippet."""

    templates: list[int]
    zygotes: list[int]
    children: list[int]


def roles(owner: int, other_templates: Collection[int] = ()) -> Roles:
    """Of the sandboxes of ``owner`` but those of ``other_templates``."""
    below = processes_of(owner)

    def children_of(parents: Collection[int]) -> list[int]:
        return sorted(p.pid for p in below if p.parent in parents and p.state != "Z")

    templates = [pid for pid in children_of([owner]) if is_guest(pid)]
    templates = [pid for pid in templates if pid not in other_templates]
    zygotes = children_of(templates)
    return Roles(templates, zygotes, children_of(zygotes))


def named(owner: int, name: str) -> list[int]:
    """Pids below ``owner`` of that name, of 15 characters at most; a snippet gives itself one with
    ``ctypes.CDLL(None).prctl(15, name)`` to show how far it is.
    """
    return [p.pid for p in processes_of(owner) if p.state != "Z" and _name(p.pid) == name]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().removesuffix("\n")
    except OSError:  # it ended while we looked
        return ""


def is_guest(pid: int) -> bool:
    """Whether it is a template, or a fork of one that has not been replaced by another program."""
    try:
        return b"bootstrap.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def control_groups(owner: int) -> list[Path]:
    """The pools of process ``owner`` in any hierarchy; csrc/core/cgroup.h has their names."""
    here = Path("/proc/self/ns/pid").stat().st_ino
    pool = re.compile(rf"thor-{here}-{owner}-\d+-\d+")
    # os.walk() does not mind that others' groups go while it looks.
    return [
        Path(parent, name)
        for parent, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if pool.fullmatch(name)
    ]


def host_files(mark: str) -> list[str]:
    """Those in the host's shared directories whose names hold ``mark``."""
    return [
        str(entry)
        for place in ("/tmp", "/dev/shm")
        for entry in Path(place).iterdir()
        if mark in entry.name
    ]


def mounts() -> list[str]:
    """Where something is mounted, as this process sees it."""
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
