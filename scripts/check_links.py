"""Checks the links of every Markdown file git knows: the file exists, and so does the heading.

Addresses on the web are left alone: a check that needs the network fails for reasons not ours.
Exit code 1 and one line per broken link.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`")


def anchors(text: str) -> set[str]:
    """The anchors a Markdown renderer gives the headings of ``text``."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeats = sum(1 for seen in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", seen))
        found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def broken_links(path: Path) -> list[str]:
    """One message for each link of ``path`` that leads nowhere."""
    problems = []
    text = path.read_text(encoding="utf-8")
    for target in LINK.findall(INLINE_CODE.sub("", FENCE.sub("", text))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists():
            problems.append(f"{target}: no such file")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text("utf-8")):
            problems.append(f"{target}: no such heading in {there.relative_to(ROOT)}")
    return [f"{path.relative_to(ROOT)}: {problem}" for problem in problems]


def main() -> int:
    """Print what is broken; the exit code."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    problems = [problem for path in paths if path.exists() for problem in broken_links(path)]
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
