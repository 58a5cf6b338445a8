"""Runs each block it is sent in a fork of its own.

    python -I -S statement_guest.py <guest folder>

A request is a line of JSON on stdin, with ``pieces`` to feed or ``whole`` to run at once, the
reference. The fork's output goes to the files ``stdout`` and ``stderr`` of the current directory,
its outcome to ``outcome``; the answer is its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any


def load(folder: str, name: str) -> Any:
    """A module of the guest, as the zygote loads it: without importing ``thor_fast``."""
    package = types.ModuleType("guest")
    package.__path__ = [folder]
    sys.modules.setdefault("guest", package)
    return importlib.import_module(f"guest.{name}")


def run_whole(text: str, namespace: dict[str, Any]) -> BaseException | None:
    """Plain Python in so many words; the file is there for the compiler's messages."""
    Path("whole").mkdir(exist_ok=True)
    os.chdir("whole")
    namespace["__annotations__"] = {}
    try:
        Path("main.py").write_text(text, encoding="utf-8", newline="")
        exec(compile(text, "main.py", "exec", dont_inherit=True), namespace)
    except BaseException as error:  # noqa: BLE001
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != "main.py":
            trace = trace.tb_next
        return error.with_traceback(trace)
    return None


def run_pieces(
    module: Any, pieces: list[str], namespace: dict[str, Any]
) -> tuple[str, BaseException | None]:
    statements = module.Statements(namespace)
    for piece in pieces[:-1]:
        statements.feed(piece)
    ending = statements.finish(pieces[-1])
    return ending.outcome.name, ending.error


def run(module: Any, request: dict[str, Any]) -> int:
    """In the fork; returns the exit code."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    outcome = Path("outcome").resolve()
    if "whole" in request:
        error = run_whole(request["whole"], main.__dict__)
    else:
        name, error = run_pieces(module, request["pieces"], main.__dict__)
        outcome.write_text(name)
        if name == "DISCARD":  # what came before is dropped
            os.dup2(os.open(outcome.with_name("error"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    if isinstance(error, SystemExit):
        if isinstance(error.code, int) or error.code is None:
            return error.code or 0
        print(error.code, file=sys.stderr)
    elif error is not None:
        load(sys.argv[1], "report").show_exception(error)
    return int(error is not None)


def serve() -> int:
    module = load(sys.argv[1], "statements")
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            return run(module, json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
