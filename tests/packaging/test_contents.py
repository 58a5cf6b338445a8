"""What wheel and sdist hold is frozen: a file more or less is a decision, not an accident."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

import pytest

# Files of the wheel that are not Python sources, by pattern.
DATA = {
    r"thor_fast/py\.typed",
    r"thor_fast/_core\.pyi",
    r"thor_fast/_core\.cpython-3\d+-[\w-]+\.so",
    r"thor_fast/synthetic/reinforce\.toml",
    r"thor_fast/synthetic/tiny_policy/[\w.]+\.(json|toml|safetensors)",
}
METADATA = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}


def _python_sources(root: Path) -> set[str]:
    package = {str(p.relative_to(root)) for p in (root / "thor_fast").rglob("*.py")}
    kernels = {f"thor_fast/kernels/{p.name}" for p in (root / "kernels").glob("*.py")}
    return package | kernels


def _wheel_files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_package_and_nothing_else(root, wheel):
    files = _wheel_files(wheel)
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    assert {name for name in files if name.startswith(info)} == {f"{info}/{n}" for n in METADATA}
    rest = {name for name in files if not name.startswith(info)}
    sources = {name for name in rest if name.endswith(".py")}
    assert sources == _python_sources(root)
    others = rest - sources
    assert [name for name in others if not any(re.fullmatch(p, name) for p in DATA)] == []
    assert [p for p in DATA if not any(re.fullmatch(p, name) for name in others)] == []


def test_wheel_stays_small(wheel):
    assert wheel.stat().st_size < 8 * 2**20


def test_kernels_are_no_package_of_their_own(root, wheel):
    # A top-level `kernels` would shadow the Hugging Face package of that name.
    assert not (root / "kernels" / "__init__.py").exists()
    assert {name.split("/")[0] for name in _wheel_files(wheel) if name.endswith(".py")} == {
        "thor_fast"
    }


def test_wheel_is_for_this_platform_and_linux(wheel):
    assert re.fullmatch(r"thor_fast-[\d.]+-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name)


def test_sdist_holds_no_build_output_and_no_ci(sdist):
    with tarfile.open(sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    unwanted = r"build/|dist/|\.git/|\.ci/|benchmarks/results/|.*\.so$|.*\.py[co]$|.*__pycache__"
    assert [name for name in names if re.match(unwanted, name)] == []
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "PKG-INFO"} <= set(names)
    assert any(name.startswith("csrc/core/") for name in names)


@pytest.mark.slow
def test_wheel_from_the_sdist_is_the_same(sdist, wheel, build_wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("thor_fast-*")
    assert _wheel_files(build_wheel(source, tmp_path)) == _wheel_files(wheel)
