"""Training from rollouts. Imports torch."""

from thor_fast.rl.advantages import (
    AdvantagePolicy,
    TrainingSequence,
    hierarchical_advantages,
    is_informative,
)
from thor_fast.rl.batching import TrainingBatch, pack
from thor_fast.rl.forward import hidden_states
from thor_fast.rl.losses import HierarchicalGRPOLoss

__all__ = [
    "AdvantagePolicy",
    "HierarchicalGRPOLoss",
    "TrainingBatch",
    "TrainingSequence",
    "hidden_states",
    "hierarchical_advantages",
    "is_informative",
    "pack",
]
