"""The contract's assertions explain themselves like those of a test module."""

import pytest

pytest.register_assert_rewrite("tests.sandbox.contract", "tests.sandbox.contract_world")
