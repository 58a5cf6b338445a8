"""Seeds of episodes, retries and continuations, and lots: pure functions, so that runs repeat.

Each has a keyed hash of its own, so that none of one kind meets one of another.
"""

from __future__ import annotations

import hashlib
import struct

__all__ = ["attempt_seed", "lot", "step_number", "trajectory_seed"]

_UINT64 = 0xFFFFFFFFFFFFFFFF


def trajectory_seed(base_seed: int, prompt: int, sample: int) -> int:
    """A 63-bit seed that depends on nothing but its three arguments, each 0 to 2**64 - 1."""
    return _seed(b"", base_seed, prompt, sample)


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of the ``attempt``-th retry of an episode, where ``seed`` drew what failed."""
    return _seed(b"attempt", seed, attempt)


def step_number(parent_seed: int, call_index: int) -> int:
    """The prompt number of continuations of one call of the trajectory that ``parent_seed`` drew.

    A step's seeds are ``trajectory_seed(base_seed, step_number(...), sample)``.
    """
    return _seed(b"step", parent_seed, call_index)


def lot(choice: str, base_seed: int, parent_seed: int, call_index: int) -> int:
    """A number drawn for one call in one kind of ``choice``: the lowest of them win."""
    return _seed(choice.encode(), base_seed, parent_seed, call_index)


def _seed(kind: bytes, *values: int) -> int:
    # Engines take any seed and look at 64 bits of it.
    packed = struct.pack(f"<{len(values)}Q", *(v & _UINT64 for v in values))
    digest = hashlib.blake2b(packed, digest_size=8, person=kind)
    return int.from_bytes(digest.digest(), "little") >> 1
