"""The user guide's examples print what it says, and both pages name only what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from thor_fast.sandbox import Status
from thor_fast.sandbox.layers import OPTIONAL_LAYERS, REQUIRED_LAYERS
from thor_fast.sandbox.tiers import default_tiers

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "sandbox-security.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "-- end of example --\n"


def test_every_example_says_what_it_prints():
    assert len(EXAMPLE.findall(GUIDE)) == GUIDE.count("```python\n") > 0


def test_examples_print_what_they_say(tmp_path):
    examples = EXAMPLE.findall(GUIDE)
    script = tmp_path / "guide.py"
    script.write_text("".join(f"{code}print({MARK!r}, end='')\n" for code, _ in examples))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(MARK) == [*(shown for _, shown in examples), ""]


@pytest.mark.parametrize("text", [GUIDE, SECURITY], ids=["sandbox.md", "sandbox-security.md"])
def test_files_named_in_the_pages_exist(text):
    named = set(re.findall(r"`((?:csrc|thor_fast|tests|scripts|benchmarks)/[\w./-]+)`", text))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_tests_named_as_proof_exist():
    sources = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/cpp/*.cc")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    python = set(re.findall(r"`(test_\w+)`", SECURITY))
    assert len(python) > 30
    assert {name for name in python if not re.search(rf"\bdef {name}\b", code)} == set()
    cpp = set(re.findall(r"`([A-Z]\w+\.[A-Z]\w+)`", SECURITY))
    assert cpp
    found = {f"{suite}.{name}" for suite, name in re.findall(r"TEST(?:_F)?\((\w+), (\w+)\)", code)}
    assert cpp - found == set()


def test_every_status_layer_and_tier_is_explained():
    assert [s.name for s in Status if f"| `{s.name}` |" not in GUIDE] == []
    assert [t.name for t in default_tiers() if f"`{t.name}`" not in GUIDE] == []
    layers = REQUIRED_LAYERS | OPTIONAL_LAYERS
    assert [name for name in sorted(layers) if f"`{name}`" not in SECURITY] == []
