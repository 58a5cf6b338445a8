"""What this process and everything below it hold, and whether that grows."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from sandbox_accounting import descendants, stat_fields

__all__ = ["Footprint", "Growth", "control_groups", "fit", "footprint"]

# Where a snippet's files would be if they escaped its jail's own tmpfs.
_SHARED_DIRECTORIES = (Path("/tmp"), Path("/dev/shm"))
_ROUNDING = 0.01  # of the fit; what must not grow at all rises by 1 at least
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes and counts at one moment, with nothing running."""

    rss_bytes: int
    """Of this process alone."""
    pss_bytes: int
    """Of the processes below it, each with its share of what it shares."""
    descriptors: int
    threads: int
    processes: int
    """Living ones below this one."""
    zombies: int
    cgroups: int
    mounts: int
    files: int
    """In the host's shared directories, with ``mark`` in their names."""


def footprint(mark: str) -> Footprint:
    """What there is now; ``mark`` is in the name of every file that the snippets write."""
    gc.collect()
    below = descendants()
    zombies = sum(_is_zombie(process.pid) for process in below)
    return Footprint(
        rss_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE,
        pss_bytes=sum(process.pss_bytes or 0 for process in below),
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=sum(1 for _ in Path("/proc/self/task").iterdir()),
        processes=len(below) - zombies,
        zombies=zombies,
        cgroups=len(control_groups(os.getpid())),
        mounts=len(Path("/proc/self/mountinfo").read_text().splitlines()),
        files=sum(mark in entry.name for each in _SHARED_DIRECTORIES for entry in each.iterdir()),
    )


def control_groups(owner: int) -> list[Path]:
    """Directories of the sandboxes of process ``owner``, in any hierarchy; csrc/core/cgroup.h."""
    pool = re.compile(rf"/thor-\d+-{owner}-\d+-\d+(/|$)")
    # os.walk() does not mind that others' groups go while it looks.
    places = (Path(parent) for parent, _, _ in os.walk("/sys/fs/cgroup"))
    return [place for place in places if pool.search(str(place))]


def _is_zombie(pid: int) -> bool:
    return stat_fields(pid)[:1] == ["Z"]


@dataclass(frozen=True, slots=True)
class Growth:
    """A straight line through the samples: what it rose by from the first to the last."""

    name: str
    first: int
    last: int
    growth: float
    tolerance: float

    @property
    def grows(self) -> bool:
        return self.growth > self.tolerance


def fit(requests: Sequence[int], samples: Sequence[Footprint], idle_jails: int) -> list[Growth]:
    """Each field's growth over ``samples``, taken after ``requests`` requests each.

    How many jails wait idle depends on who asked last: ``idle_jails`` is how many may come or go.
    A leak of one of anything per 1,000 requests is beyond these tolerances after 200,000.
    """
    if len(samples) < 3:
        raise ValueError(f"got {len(samples)} samples, expected at least 3 for a fit")
    span = requests[-1] - requests[0]
    tolerances = {
        # glibc's arenas keep what was freed: 4 MiB were seen to come and go; 32 bytes a request
        # are less than the smallest object anybody could forget.
        "rss_bytes": (4 << 20) + 32 * span,
        # A jail's two processes: page tables and what the collector of the C library has touched.
        "pss_bytes": idle_jails * (8 << 20) + 32 * span,
        "descriptors": idle_jails * 5,  # socket, pidfds of zygote and child, two pipes
        "threads": _ROUNDING,
        "processes": idle_jails * 2,  # the zygote and its waiting child
        "zombies": _ROUNDING,
        "cgroups": idle_jails,
        "mounts": _ROUNDING,
        "files": _ROUNDING,
    }
    result = []
    for field in fields(Footprint):
        values = [getattr(sample, field.name) for sample in samples]
        slope = float(np.polyfit(np.asarray(requests, float), np.asarray(values, float), 1)[0])
        result.append(
            Growth(field.name, values[0], values[-1], slope * span, tolerances[field.name])
        )
    return result
