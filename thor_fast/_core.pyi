# Types of the extension module; the code is in csrc/bindings.

from typing import TypeAlias

__version__: str

Completion: TypeAlias = tuple[
    int,  # ticket
    str,  # thor_fast.types.Status value
    bytes,  # stdout
    bytes,  # stderr
    int,  # exit code, -1 for none
    int,  # signal, 0 for none
    float,  # wall_s
    float,  # cpu_s
    int,  # peak memory, bytes
    bool,  # truncated
    str,  # error
]

class StartError(RuntimeError): ...
class QueueFullError(RuntimeError): ...

class CompletionQueue:
    def __init__(self) -> None: ...
    def event_fd(self) -> int: ...
    def drain(self) -> list[Completion]: ...
    def wait(self, timeout_ms: int) -> list[Completion]: ...

class Orchestrator:
    def __init__(
        self,
        *,
        argv: list[str],
        env: list[str],
        slots: int,
        queue_capacity: int,
        startup_timeout_s: float,
    ) -> None: ...
    def submit(
        self,
        sink: CompletionQueue,
        *,
        payload: bytes,
        stdin_data: bytes,
        timeout_s: float,
        cpu_s: float,
        memory_bytes: int,
        max_output_bytes: int,
        max_processes: int,
    ) -> int: ...
    def cancel(self, ticket: int) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None: ...

def serve_zygote(control_fd: int, readonly_paths: list[str], run: object) -> None: ...
def probe_host() -> list[tuple[str, bool, str]]: ...  # (layer, granted, detail)
