"""One worker of the persistent pool: runs snippet after snippet in the same interpreter.

    python -I pool_worker.py      length-prefixed source on stdin, length-prefixed marshal on stdout

Nothing is reset in between: a snippet sees and can break what earlier ones left in modules.
"""

from __future__ import annotations

import contextlib
import io
import marshal
import os
import struct
import sys
import traceback


def _run(code: str) -> tuple[bool, str, str]:
    """Whether it ended well, stdout, stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    passed = True
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except BaseException:  # noqa: BLE001  (whatever the snippet raised is its result)
            passed = False
            traceback.print_exc()
    return passed, stdout.getvalue(), stderr.getvalue()


def main() -> None:
    """Serve until stdin is closed."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    while header := requests.read(4):
        (size,) = struct.unpack("<I", header)
        answer = marshal.dumps(_run(requests.read(size).decode()))
        answers.write(struct.pack("<I", len(answer)) + answer)
        answers.flush()


main()
