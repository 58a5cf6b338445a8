"""The README's commands are the ones CI runs, and its example runs as it stands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _example() -> str:
    found = re.search(r"^## Example\n\n```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_quick_start_is_two_commands_on_the_first_screen():
    assert _script("readme_commands").quick_start_commands(README) == [
        "pip install -c constraints.txt . && python benchmarks/rollout_throughput.py",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]
    assert README[: README.index("```sh")].count("\n") < 40


def test_quick_start_missing_is_said():
    module = _script("readme_commands")
    with pytest.raises(ValueError, match="has no section '## Quick start'"):
        module.quick_start_commands("# thor_fast\n")
    with pytest.raises(ValueError, match="has no sh block"):
        module.quick_start_commands("## Quick start\n\nSoon.\n## More\n```sh\nls\n```\n")


def test_example_is_short():
    lines = [line for line in _example().splitlines() if line.strip()]
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 100


def test_example_runs(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(_example(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "```python\n" in done.stdout
    assert "```output\n" in done.stdout
    rewards = re.search(r"\[([^]]*)\]$", done.stdout.strip())
    assert rewards is not None
    # Two samples of one task, both scored: None would mean that our side failed.
    assert [r.strip() in ("0.0", "1.0") for r in rewards[1].split(",")] == [True, True]


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[a](nowhere.md)", "nowhere.md: no such file"),
        ("[a](#lost)", "#lost: no such heading"),
        ("![a](there.md#two--three-1)", None),
        ("[a](#one)", None),
        ("`[a](nowhere.md)`", None),
        ("[a](https://example.org/nowhere)", None),
    ],
)
def test_the_link_checker_finds_what_is_broken(tmp_path, monkeypatch, link, problem):
    module = _script("check_links")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# One\n{link}\n```\n[a](in-a-fence.md)\n```\n")
    (tmp_path / "there.md").write_text("# Two & Three\n\n## Two & Three\n")
    found = module.broken_links(page)
    assert [problem in line for line in found] == ([True] if problem else [])
