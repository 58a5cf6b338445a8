"""One sandbox for the whole suite: what one case breaks, the next ones would show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import NativeSandbox

pytest.register_assert_rewrite("tests.sandbox.abuse.harness")

from .harness import LIMITS, Abuse, assert_unharmed  # noqa: E402  (after its rewriting is asked for)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def secret() -> Iterator[str]:
    """A secret in this process's environment and memory from before the sandbox starts."""
    value = "hunter2-correct-horse-battery-staple"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THOR_ABUSE_SECRET", value)
        yield value


@pytest.fixture(scope="session")
def box(secret: str) -> Iterator[NativeSandbox]:
    """One slot, so that each snippet runs where the one before it ran."""
    with NativeSandbox(slots=1, limits=LIMITS) as sandbox:
        yield sandbox


@pytest.fixture
def abuse(box: NativeSandbox) -> Iterator[Abuse]:
    yield Abuse(box)
    assert_unharmed(box)


@pytest.fixture(scope="session")
def two_slots(secret: str) -> Iterator[NativeSandbox]:
    with NativeSandbox(slots=2, limits=LIMITS) as sandbox:
        yield sandbox


@pytest.fixture
def neighbours(two_slots: NativeSandbox) -> Iterator[NativeSandbox]:
    """Two snippets at a time, for what one does to another that runs beside it."""
    yield two_slots
    assert_unharmed(two_slots)
