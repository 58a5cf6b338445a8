"""How a benchmark speaks: progress while it runs, a JSON line for the record, a table at last."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Update", "append_record", "first_line", "print_table", "progress"]

SCHEMA_VERSION = 1
_PACKAGES = (
    *("thor_fast", "torch", "triton", "transformers", "numpy", "vllm"),
    *("trl", "verl", "liger-kernel", "quack-kernels", "cut-cross-entropy"),
)
_REPOSITORY = Path(__file__).parent.parent


class Update(Protocol):
    """``done`` of ``total`` episodes."""

    def __call__(self, done: int, total: int) -> None: ...


@contextmanager
def progress(label: str) -> Iterator[Update]:
    """A bar on a terminal; elsewhere one plain line at the end, so that a log stays readable."""
    if sys.stdout.isatty():
        with _bar(label) as update:
            yield update
        return
    started = time.perf_counter()
    count = 0

    def note(done: int, total: int) -> None:
        nonlocal count
        count = done

    yield note
    print(f"{label}: {count} episodes in {time.perf_counter() - started:.1f} s", flush=True)


@contextmanager
def _bar(label: str) -> Iterator[Update]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Two refreshes a second: the bar's own thread shares the GIL with what is being measured.
    with Progress(*columns, console=Console(), refresh_per_second=2) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def first_line(error: Exception) -> str:
    """Of a message that may have many."""
    return str(error).strip().partition("\n")[0]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain aligned columns, the same on a terminal and in a file."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        first, *rest = [
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join((first, *rest)).rstrip())


def append_record(
    path: Path, benchmark: str, params: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """Append one JSON line: schema, when, what code, where, which versions, params, metrics."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **_commit(),
        "host": _host(),
        "versions": _versions(),
        "params": dict(params),
        "metrics": dict(metrics),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _commit() -> dict[str, Any]:
    """The commit of the checkout, and whether it has changes beyond benchmark results."""
    # A copy of a working tree has no history: whoever copied it may say what it was.
    commit = _git("rev-parse", "HEAD") or os.environ.get("THOR_COMMIT")
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked archive, or a machine without git
    return run.stdout.strip()


def _host() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
