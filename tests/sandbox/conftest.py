"""A sandbox for streams and sessions; and the contract's assertions explain themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from thor_fast.sandbox import NativeSandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.register_assert_rewrite("tests.sandbox.contract", "tests.sandbox.contract_world")


@pytest.fixture(scope="module")
def shared() -> Iterator[NativeSandbox]:
    with NativeSandbox() as box:
        yield box


@pytest.fixture
def sandbox(shared: NativeSandbox) -> Iterator[NativeSandbox]:
    yield shared
    assert shared.execute("print('alive')").stdout == "alive\n"
    assert shared.stats()["dialogues"] == 0, "every test closes what it opens"
