"""Problems that need exact computation, and a tiny policy that solves them by writing Python.

For the quick start, the benchmarks and the tests: real sampling, real code, real failures, on two
CPU cores. Importing this package does not import torch; :func:`load_tiny_policy` does.
"""

from thor_fast.synthetic.policy import load_policy, load_tiny_policy, tiny_policy_path
from thor_fast.synthetic.tasks import (
    HELD_OUT_FAMILIES,
    TEST_SEED,
    TRAIN_SEED,
    TRAINED_FAMILIES,
    Step,
    Task,
    generate,
    task_set,
)

__all__ = [
    "HELD_OUT_FAMILIES",
    "TEST_SEED",
    "TRAINED_FAMILIES",
    "TRAIN_SEED",
    "Step",
    "Task",
    "generate",
    "load_policy",
    "load_tiny_policy",
    "task_set",
    "tiny_policy_path",
]
