"""What one episode may use."""

from __future__ import annotations

from dataclasses import dataclass

from thor_fast.errors import ConfigError

__all__ = ["RolloutLimits"]


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """Budgets of one episode; using one up is a ``StopReason``, not an error.

    ``max_response_tokens``: all tokens after the prompt, observations included. ``max_tool_calls``:
    calls that run. ``deadline_s``: wall-clock seconds from the start of the episode, tool time
    included; ``None`` for none. The default of five calls is THOR's ``max_interaction_round``.
    """

    max_response_tokens: int = 4096
    max_tool_calls: int = 5
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1:
            raise ConfigError(f"max_response_tokens is {self.max_response_tokens}, expected >= 1")
        if self.max_tool_calls < 0:
            raise ConfigError(f"max_tool_calls is {self.max_tool_calls}, expected >= 0")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"deadline_s is {self.deadline_s}, expected > 0 or None")
