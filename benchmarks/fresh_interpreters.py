"""The usual way to run a model's Python: a server on this machine, a fresh interpreter per snippet.

UNSAFE, and here only to be measured against: the snippet has the rights of the benchmark.
"""

from __future__ import annotations

import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path

from thor_fast.errors import SandboxError
from thor_fast.sandbox.fusion import FusionSandbox

__all__ = ["FreshInterpreters"]

_SERVER = Path(__file__).parent / "fusion_server.py"
# What THOR's rollout has on the way at a time.
_REQUESTS = 8
_CLOSE_S = 10.0


class FreshInterpreters(FusionSandbox):
    """SandboxFusion's protocol with a server of its own, ``fusion_server.py``, as THOR uses it.

    Snippets run in an interpreter without anybody's start-up hooks, that of an empty virtual
    environment, and can import what is installed here.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        try:
            venv.create(self._folder.name, symlinks=True)
            self._process, port = _start(Path(self._folder.name) / "bin" / "python")
        except BaseException:
            self._folder.cleanup()
            raise
        super().__init__(f"http://127.0.0.1:{port}", concurrency=_REQUESTS)

    def close(self) -> None:
        super().close()
        # Its end of input tells the server to stop.
        self._process.communicate(timeout=_CLOSE_S)
        self._folder.cleanup()


def _start(python: Path) -> tuple[subprocess.Popen[str], str]:
    """The server and its port."""
    process = subprocess.Popen(
        [python, _SERVER, python],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": sysconfig.get_path("purelib")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    if not port:
        raise SandboxError("the server for fresh interpreters did not start")
    return process, port
