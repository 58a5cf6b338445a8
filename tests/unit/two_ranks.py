"""A script on two processes that find each other by a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def on_two_ranks(script: Path, folder: Path) -> list[Any]:
    """What each rank prints, read as JSON; ``script`` is given its rank and the file's path."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", str(script), str(rank), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [rank.communicate(timeout=600) for rank in ranks]
    for rank, (_, stderr) in zip(ranks, done, strict=True):
        assert rank.returncode == 0, stderr
    return [json.loads(stdout) for stdout, _ in done]
