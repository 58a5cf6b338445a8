"""thor_fast: fast, safe, exact tool-integrated reasoning for LLM reinforcement learning.

Importing this package loads neither torch nor vllm: the names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thor_fast.engines.base import SamplingParams as SamplingParams
    from thor_fast.engines.paged import PagedEngine as PagedEngine
    from thor_fast.inference import self_correct as self_correct
    from thor_fast.rewards import MathAnswerReward as MathAnswerReward
    from thor_fast.rewards import MathVerifier as MathVerifier
    from thor_fast.rl.settings import TrainerConfig as TrainerConfig
    from thor_fast.rl.trainer import Trainer as Trainer
    from thor_fast.rollout.backtrack import BacktrackPolicy as BacktrackPolicy
    from thor_fast.rollout.branch import BranchPolicy as BranchPolicy
    from thor_fast.rollout.limits import RolloutLimits as RolloutLimits
    from thor_fast.rollout.loop import run_episode as run_episode
    from thor_fast.rollout.renderer import Renderer as Renderer
    from thor_fast.rollout.scheduler import Prompt as Prompt
    from thor_fast.rollout.scheduler import RolloutScheduler as RolloutScheduler
    from thor_fast.rollout.splice import ObservationEncoder as ObservationEncoder
    from thor_fast.sandbox import NativeSandbox as NativeSandbox
    from thor_fast.tools.python_tool import PythonTool as PythonTool
    from thor_fast.types import ExecutionRequest as ExecutionRequest
    from thor_fast.types import ExecutionResult as ExecutionResult
    from thor_fast.types import Status as Status
    from thor_fast.types import StopReason as StopReason
    from thor_fast.types import Trajectory as Trajectory

__version__ = "0.1.0"

_EXPORTS = {
    "BacktrackPolicy": "thor_fast.rollout.backtrack",
    "BranchPolicy": "thor_fast.rollout.branch",
    "ExecutionRequest": "thor_fast.types",
    "ExecutionResult": "thor_fast.types",
    "MathAnswerReward": "thor_fast.rewards",
    "MathVerifier": "thor_fast.rewards",
    "NativeSandbox": "thor_fast.sandbox",
    "ObservationEncoder": "thor_fast.rollout.splice",
    "PagedEngine": "thor_fast.engines.paged",
    "Prompt": "thor_fast.rollout.scheduler",
    "PythonTool": "thor_fast.tools.python_tool",
    "Renderer": "thor_fast.rollout.renderer",
    "RolloutLimits": "thor_fast.rollout.limits",
    "RolloutScheduler": "thor_fast.rollout.scheduler",
    "SamplingParams": "thor_fast.engines.base",
    "Status": "thor_fast.types",
    "StopReason": "thor_fast.types",
    "Trainer": "thor_fast.rl.trainer",
    "TrainerConfig": "thor_fast.rl.settings",
    "Trajectory": "thor_fast.types",
    "run_episode": "thor_fast.rollout.loop",
    "self_correct": "thor_fast.inference",
}

__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'thor_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
