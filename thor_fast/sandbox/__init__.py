"""Running model-written code apart from everything else. Needs no torch."""

from thor_fast.sandbox.base import Sandbox
from thor_fast.sandbox.native import NativeSandbox, SandboxLimits
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = [
    "ExecutionRequest",
    "ExecutionResult",
    "NativeSandbox",
    "Sandbox",
    "SandboxLimits",
    "Status",
]
