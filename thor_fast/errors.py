"""The exceptions thor_fast raises when *we* or our caller are at fault.

What a model's code does is never an exception: it is a :class:`~thor_fast.types.Status`. What ends
a trajectory is never an exception: it is a :class:`~thor_fast.types.StopReason`. Each class is also
the built-in a caller would expect to catch.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "RewardError",
    "SandboxError",
    "ThorError",
    "ToolError",
    "TrainingError",
]


class ThorError(Exception):
    """Base of everything raised on purpose by thor_fast."""


class ConfigError(ThorError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class EngineError(ThorError, RuntimeError):
    """The engine cannot serve the request, or broke while serving it."""


class SandboxError(ThorError, RuntimeError):
    """The sandbox cannot be started or used; never raised because of a snippet's own behaviour."""


class ToolError(ThorError, ValueError):
    """A tool or its tokenizer is set up in a way that cannot work."""


class RewardError(ThorError, ValueError):
    """A reward function was called with something it cannot score by design."""


class DataError(ThorError, ValueError):
    """A token sequence, a file or a record breaks an invariant of :mod:`thor_fast.types`."""


class TrainingError(ThorError, RuntimeError):
    """A training run cannot go on; the message names the step and the last checkpoint."""
