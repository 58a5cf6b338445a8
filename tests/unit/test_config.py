"""TOML files to frozen dataclasses: everything is checked, nothing is dropped."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.config import dump_toml, from_mapping, load_toml
from thor_fast.engines.base import SamplingParams
from thor_fast.errors import ConfigError
from thor_fast.rollout import RolloutLimits
from thor_fast.tools import ExecutionLimits


@dataclass(frozen=True, slots=True)
class Setup:
    name: str
    limits: RolloutLimits = field(default_factory=RolloutLimits)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sandbox: ExecutionLimits = field(default_factory=ExecutionLimits)
    verbose: bool = False


FILE = """
name = "a \\"run\\""
[limits]
max_response_tokens = 100
deadline_s = 30
[sampling]
temperature = 0.6
[sandbox]
timeout_s = 2.5
"""


def load(tmp_path: Path, text: str) -> Setup:
    path = tmp_path / "run.toml"
    path.write_text(text, "utf-8")
    return load_toml(path, Setup)


def test_load(tmp_path: Path) -> None:
    setup = load(tmp_path, FILE)
    assert setup == Setup(
        'a "run"',
        RolloutLimits(max_response_tokens=100, deadline_s=30.0),
        SamplingParams(temperature=0.6),
        ExecutionLimits(timeout_s=2.5),
    )
    assert type(setup.limits.deadline_s) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\nverbos = true', "unknown key 'verbos', expected one of: verbose"),
        ('name = "x"\n[limits]\nmax_tokens = 1', r"\[limits\] unknown key 'max_tokens'"),
        ('name = "x"\nzzz = 1', "expected one of: limits, name, sampling, sandbox, verbose"),
        ("", "key 'name' is missing, expected str"),
        ("name = 3", r"name is 3 \(int\), expected str"),
        ('name = "x"\nverbose = 1', r"verbose is 1 \(int\), expected bool"),
        (
            'name = "x"\n[limits]\nmax_tool_calls = true',
            r"limits.max_tool_calls is True \(bool\), expected int",
        ),
        (
            'name = "x"\n[limits]\nmax_tool_calls = 2.0',
            r"limits.max_tool_calls is 2.0 \(float\), expected int",
        ),
        (
            'name = "x"\n[limits]\ndeadline_s = "10"',
            r"limits.deadline_s is '10' \(str\), expected float$",
        ),
        ('name = "x"\nlimits = 3', r"limits is 3 \(int\), expected a section"),
        (
            'name = "x"\n[sampling]\ntop_p = 1.5',
            r"\[sampling\] top_p is 1.5, expected in \(0, 1\]",
        ),
        ('name = "x"\n[limits]\nmax_tool_calls = -1', r"\[limits\] max_tool_calls is -1"),
        ("name = ", "is not TOML"),
    ],
)
def test_errors_name_file_key_got_and_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert "run.toml" in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file"):
        load_toml(tmp_path / "none.toml", Setup)


def test_nearest_names_come_first() -> None:
    with pytest.raises(ConfigError, match="expected one of: max_tool_calls"):
        from_mapping({"max_tool_call": 1}, RolloutLimits)


SETUPS = st.builds(
    Setup,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    limits=st.builds(
        RolloutLimits,
        max_response_tokens=st.integers(1, 2**62),
        deadline_s=st.none() | st.floats(min_value=1e-9, allow_nan=False),
    ),
    sampling=st.builds(SamplingParams, temperature=st.floats(0, 1e30), seed=st.integers(0, 2**62)),
    sandbox=st.builds(ExecutionLimits, memory_bytes=st.none() | st.integers(0, 2**62)),
    verbose=st.booleans(),
)


@given(SETUPS)
def test_what_is_dumped_is_read_back(setup: Setup) -> None:
    text = dump_toml(setup)
    assert from_mapping(tomllib.loads(text), Setup) == setup


def test_dump_is_readable() -> None:
    assert dump_toml(Setup("x", sandbox=ExecutionLimits(timeout_s=2.0))) == (
        'name = "x"\nverbose = false\n\n[limits]\nmax_response_tokens = 4096\n'
        "max_tool_calls = 5\n\n[sampling]\ntemperature = 1.0\ntop_p = 1.0\ntop_k = 0\nseed = 0\n"
        "\n[sandbox]\ntimeout_s = 2.0\n"
    )


def test_nested_sections() -> None:
    @dataclass(frozen=True, slots=True)
    class Outer:
        inner: Setup

    # A class of a function cannot be found by name, so its hints are given as objects.
    Outer.__annotations__["inner"] = Setup
    outer = Outer(Setup("x", verbose=True))
    text = dump_toml(outer)
    assert "[inner.limits]" in text
    assert from_mapping(tomllib.loads(text), Outer) == outer
    with pytest.raises(ConfigError, match=r"\[inner.limits\] unknown key 'x'"):
        from_mapping({"inner": {"name": "x", "limits": {"x": 1}}}, Outer)


@dataclass(frozen=True, slots=True)
class Choice:
    mode: Literal["fast", "exact"] = "fast"
    other: Literal["fast", "exact"] | None = None


def test_choices() -> None:
    assert from_mapping({"mode": "exact", "other": "fast"}, Choice) == Choice("exact", "fast")
    assert from_mapping(tomllib.loads(dump_toml(Choice("exact"))), Choice) == Choice("exact")
    with pytest.raises(ConfigError, match=r"mode is 'slow' \(str\), expected 'fast' or 'exact'$"):
        from_mapping({"mode": "slow"}, Choice)
    with pytest.raises(ConfigError, match=r"other is 1 \(int\), expected 'fast' or 'exact'$"):
        from_mapping({"other": 1}, Choice)


def test_what_toml_has_no_word_for_is_refused() -> None:
    @dataclass
    class Odd:
        value: object

    with pytest.raises(ConfigError, match="value is a set, expected int, float"):
        dump_toml(Odd({1}))
