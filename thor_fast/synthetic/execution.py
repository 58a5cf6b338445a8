"""Really running the training programs, so that outputs and error texts are never made up."""

from __future__ import annotations

import contextlib
import io
import traceback

from thor_fast.types import ExecutionResult, Status

__all__ = ["run_trusted"]


def run_trusted(code: str) -> ExecutionResult:
    """Run ``code`` in this process and report it the way a sandbox does.

    Only for programs made by our own templates: nothing is isolated or limited. Code a model wrote
    belongs in a :class:`~thor_fast.sandbox.base.Sandbox`; a fork each would only cost time here.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout):
            exec(compile(code, "<snippet>", "exec"), {"__name__": "__main__"})  # noqa: S102
    except Exception as error:  # noqa: BLE001 - what the broken program raises is the data we want
        # As the sandbox's guest prints it; the interpreter's own hook words some hints differently.
        traceback.print_exception(error, file=stderr)
        return ExecutionResult(
            Status.ERROR, stdout=stdout.getvalue(), stderr=stderr.getvalue(), exit_code=1
        )
    return ExecutionResult(Status.OK, stdout=stdout.getvalue(), exit_code=0)
