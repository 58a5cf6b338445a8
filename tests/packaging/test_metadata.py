"""Version, extras and the platforms we refuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import zipfile
from email.parser import Parser

import pytest

import thor_fast


@pytest.fixture(scope="module")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_one_version_everywhere(root, pyproject, wheel):
    version = pyproject["project"]["version"]
    assert thor_fast.__version__ == version
    cmake = re.search(r"project\(thor_fast VERSION (\S+)", (root / "CMakeLists.txt").read_text())
    assert cmake is not None
    assert cmake[1] == version
    assert wheel.name.startswith(f"thor_fast-{version}-")
    assert f"## [{version}]" in (root / "CHANGELOG.md").read_text()


def test_extras_are_exactly_these(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    extras = metadata.get_all("Provides-Extra")
    assert sorted(extras) == sorted(
        ["vllm", "openai", "train", "math", "verl", "trl", "nsjail", "serve", "test", "dev"]
    )
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"


def test_every_direct_dependency_ci_installs_is_pinned(root, pyproject):
    pins = dict(
        line.split("==")
        for line in (root / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    extras = pyproject["project"]["optional-dependencies"]
    wanted = [
        *pyproject["build-system"]["requires"],
        *pyproject["project"]["dependencies"],
        *extras["openai"],
        *extras["train"],
        *extras["math"],
        *extras["test"],
        *extras["dev"],
    ]
    names = {re.match(r"[\w.-]+", spec)[0].replace("_", "-").lower() for spec in wanted}
    assert names - pinned == {"thor-fast"}
    assert pins["torch"] == "2.13.0"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["CMAKE_SYSTEM_NAME=Darwin"], "thor_fast needs Linux"),
        (["CMAKE_SYSTEM_NAME=Darwin"], "this system is Darwin"),
        (
            ["CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=riscv64"],
            "knows the system calls of x86_64 and aarch64; this is riscv64",
        ),
    ],
)
def test_other_systems_are_refused_when_building(root, tmp_path, settings, message):
    done = subprocess.run(
        ["cmake", "-S", root, "-B", tmp_path, *(f"-D{setting}" for setting in settings)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
