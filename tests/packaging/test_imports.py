"""What importing loads, each time in a fresh interpreter that cannot see the source tree."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

HEAVY = ("torch", "transformers", "triton", "vllm")

BLOCK_HEAVY = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {(*HEAVY, "tokenizers", "ray", "verl", "trl")!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocked())
"""


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "thor_fast",
        "thor_fast.types",
        "thor_fast.sandbox",
        "thor_fast.tools",
        "thor_fast.engines.base",
        "thor_fast.rollout.loop",
        "thor_fast.rollout.scheduler",
    ],
)
def test_loads_neither_torch_nor_vllm(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert _python(code) == "[]\n"


def test_lazy_names_all_resolve():
    code = """
        import thor_fast
        for name in thor_fast.__all__:
            assert getattr(thor_fast, name) is not None, name
        assert set(thor_fast.__all__) <= set(dir(thor_fast)), dir(thor_fast)
    """
    _python(code)


def test_unknown_name_is_an_attribute_error():
    assert "has no attribute 'nothing'" in _python(
        """
        import thor_fast
        try:
            thor_fast.nothing
        except AttributeError as error:
            print(error)
        """
    )


def test_the_trainer_says_which_extra_it_needs():
    assert "pip install 'thor_fast[train]'" in _python(
        """
        import sys
        sys.modules["accelerate"] = None
        import thor_fast
        try:
            thor_fast.Trainer
        except ModuleNotFoundError as error:
            print(error)
        """
    )


def test_sandbox_runs_where_torch_is_not_installed():
    code = BLOCK_HEAVY + textwrap.dedent(
        """
        from thor_fast.sandbox import NativeSandbox
        with NativeSandbox() as sandbox:
            result = sandbox.execute("print(6 * 7)")
        print(result.status.value, result.stdout.strip())
        """
    )
    assert _python(code) == "ok 42\n"
