"""Running model-written code apart from everything else. Needs no torch."""

from thor_fast.sandbox.base import Sandbox
from thor_fast.sandbox.dialogue import Stream
from thor_fast.sandbox.native import NativeSandbox
from thor_fast.sandbox.session import Session
from thor_fast.sandbox.tiers import Tier, default_tiers
from thor_fast.sandbox.wire import Determinism, SandboxLimits
from thor_fast.types import ExecutionRequest, ExecutionResult, Status

__all__ = [
    "Determinism",
    "ExecutionRequest",
    "ExecutionResult",
    "NativeSandbox",
    "Sandbox",
    "SandboxLimits",
    "Session",
    "Status",
    "Stream",
    "Tier",
    "default_tiers",
]
