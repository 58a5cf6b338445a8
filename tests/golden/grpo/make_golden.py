"""Records the peers' losses anew: an environment of their own, then one process per peer.

    python tests/golden/grpo/make_golden.py DIRECTORY_OF_THE_ENVIRONMENT

Deterministic on one machine; on another the last bits of what a peer gives may differ.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("trl", "verl", "liger")


def main(directory: Path) -> None:
    """Make the environment if it is not there, and run every peer in it."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    # Without dependencies: the peers ask for more than their losses import, and not for the same.
    install = ["-m", "pip", "install", "--no-deps", "-r", str(HERE / "requirements.txt")]
    subprocess.run([str(python), *install], check=True)
    code = "import batches, numpy; numpy.savez_compressed('inputs.npz', **batches.make())"
    # One thread: the order in which a matrix product adds is then always the same.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for arguments in (["-c", code], *([f"peer_{peer}.py"] for peer in PEERS)):
        subprocess.run([str(python), *arguments], cwd=HERE, env=environment, check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"got {len(sys.argv) - 1} arguments, expected the environment's directory")
    main(Path(sys.argv[1]).absolute())
