"""Prints the README's quick-start commands, one per line, so that CI runs what users read."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def quick_start_commands(readme: str) -> list[str]:
    """The lines of every ``sh`` block between the quick start's heading and the next one."""
    section = re.search(r"^## Quick start\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError("README.md has no section '## Quick start'")
    blocks = re.findall(r"^```sh\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    commands = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    if not commands:
        raise ValueError("README.md's quick start has no sh block")
    return commands


if __name__ == "__main__":
    print("\n".join(quick_start_commands(README.read_text(encoding="utf-8"))))
