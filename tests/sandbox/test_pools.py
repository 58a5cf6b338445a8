"""After filling, the interpreter's new small objects lie side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GUEST = Path(__file__).parents[2] / "thor_fast" / "sandbox" / "guest"

FILL_AND_ALLOCATE = """
import sys
sys.path.insert(0, sys.argv[1])
import pools

holes = [[bytes(size) for _ in range(999)] for size in (30, 95, 300)]
for row in holes:
    del row[::2]
filler = pools.fill()
assert len(filler) > 1400, len(filler)
for size in (30, 95, 300):
    step = -(-(size + 33) // 16) * 16
    new = [bytes(size) for _ in range(5)]
    print([(id(b) - id(a)) / step for a, b in zip(new, new[1:])])
"""


def test_new_objects_follow_one_another() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", FILL_AND_ALLOCATE, str(GUEST)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("[1.0, 1.0, 1.0, 1.0]\n" * 3, "")
