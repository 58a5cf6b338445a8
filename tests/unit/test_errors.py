"""Every error is a ThorError and the built-in a caller would catch."""

from __future__ import annotations

import pytest

from thor_fast import errors

BUILT_INS = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "EngineError": RuntimeError,
    "RewardError": ValueError,
    "SandboxError": RuntimeError,
    "ToolError": ValueError,
    "TrainingError": RuntimeError,
}


def test_the_taxonomy_is_complete() -> None:
    assert set(errors.__all__) == {*BUILT_INS, "ThorError"}


@pytest.mark.parametrize("name", BUILT_INS)
def test_each_is_also_a_built_in(name: str) -> None:
    error = getattr(errors, name)("message")
    assert isinstance(error, errors.ThorError)
    assert isinstance(error, BUILT_INS[name])
    assert str(error) == "message"
