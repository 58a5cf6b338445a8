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
    dict[str, bytes],  # files
    bytes,  # reply of a dialogue's guest
    str,  # error
]

class StartError(RuntimeError): ...
class QueueFullError(RuntimeError): ...

class CompletionQueue:
    def __init__(self) -> None: ...
    def event_fd(self) -> int: ...
    def drain(self) -> list[Completion]: ...
    def wait(self, timeout_ms: int) -> list[Completion]: ...

class Limits:
    def __init__(
        self,
        *,
        timeout_s: float,
        cpu_s: float,
        memory_bytes: int,
        max_output_bytes: int,
        max_processes: int,
    ) -> None: ...

class Request:
    def __init__(
        self,
        *,
        payload: bytes,
        stdin_data: bytes,
        limits: Limits,
        tier: int,
        priority: int,
        collect: list[str],
        accumulate: bool,
        life_s: float,
    ) -> None: ...

class CgroupPool:
    def __init__(self) -> None: ...
    @property
    def granted(self) -> bool: ...
    @property
    def path(self) -> str: ...
    @property
    def reason(self) -> str: ...

class Orchestrator:
    def __init__(
        self,
        *,
        tiers: list[tuple[str, list[str]]],
        env: list[str],
        cpus: list[int],
        slots: int,
        max_dialogues: int,
        queue_capacity: int,
        startup_timeout_s: float,
        cgroups: CgroupPool | None,
    ) -> None: ...
    def submit(self, request: Request, sink: CompletionQueue) -> int: ...
    def open_dialogue(self, opening: Request) -> int: ...
    def step(
        self, dialogue: int, data: bytes, limits: Limits, tier: int, sink: CompletionQueue
    ) -> int: ...
    def close_dialogue(self, dialogue: int) -> None: ...
    def cancel(self, ticket: int) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def layers(self) -> list[str]: ...
    def close(self) -> None: ...

def serve_template(
    control_fd: int, jail: dict[str, object], refresh: object, run: object
) -> None: ...
def report_out_of_memory() -> None: ...
def pace_standard_output() -> None: ...
def fill_free_memory() -> int: ...  # bytes taken
def lay_out_memory() -> int: ...  # bytes now in huge pages
def use_own_arenas() -> None: ...
def probe_host() -> list[tuple[str, bool, str]]: ...  # (layer, granted, detail)
