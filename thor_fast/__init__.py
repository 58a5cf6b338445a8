"""thor_fast: fast, safe, exact tool-integrated reasoning for LLM reinforcement learning.

Importing this package loads neither torch nor vllm: names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thor_fast.types import ExecutionRequest as ExecutionRequest
    from thor_fast.types import ExecutionResult as ExecutionResult
    from thor_fast.types import Status as Status
    from thor_fast.types import StopReason as StopReason
    from thor_fast.types import Trajectory as Trajectory

__version__ = "0.1.0"

_EXPORTS = {
    "ExecutionRequest": "thor_fast.types",
    "ExecutionResult": "thor_fast.types",
    "Status": "thor_fast.types",
    "StopReason": "thor_fast.types",
    "Trajectory": "thor_fast.types",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'thor_fast' has no attribute {name!r}")
