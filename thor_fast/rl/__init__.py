"""Training from rollouts. Imports torch."""

from thor_fast.rl.batching import TrainingBatch
from thor_fast.rl.losses import HierarchicalGRPOLoss

__all__ = ["HierarchicalGRPOLoss", "TrainingBatch"]
