"""Leaves the small-object allocator without holes, so that a fork's new objects lie side by side.

Loaded from its file by ``bootstrap.py``, so only the standard library is imported here.

The allocator (CPython's ``Objects/obmalloc.c``, "pymalloc") keeps pools of 16 KiB for each size and
fills the holes of old ones first. In a fork every hole is on another page that must be copied, and
the pool's header on a second one. After :func:`fill` each size has a new pool with few objects
in it: what follows is written next to it, on the page of the header.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["fill"]

_POOL_BYTES = 16 << 10
_HEADER_BYTES = 48  # a pool's first object comes after it
_STEP_BYTES = 16
_LARGEST_BYTES = 512  # larger ones are malloc's
_BYTES_OVERHEAD = 33  # of a bytes object
_IN_A_ROW = 3  # from a pool's start on, so that it is a new one, not holes of an old one
_MOST_BYTES = 1 << 20  # of one size: there may be another allocator in use, without pools


def fill() -> list[object]:
    """Fill the holes; for as long as the result is kept."""
    kept: list[object] = []
    for size in range(_STEP_BYTES, _LARGEST_BYTES + 1, _STEP_BYTES):
        new = _maker(size)
        in_a_row, last = 0, 0
        for _ in range(_MOST_BYTES // size):
            one = new()
            kept.append(one)
            at = id(one)
            if at % _POOL_BYTES == _HEADER_BYTES:
                in_a_row = 1
            elif at == last + size and in_a_row:
                in_a_row += 1
            else:
                in_a_row = 0
            if in_a_row == _IN_A_ROW:
                break
            last = at
    return kept


def _maker(size: int) -> Callable[[], object]:
    """Makes objects that take so many bytes, rounded up to the allocator's step."""
    if size == _STEP_BYTES:
        return object
    if size == 2 * _STEP_BYTES:
        return lambda: complex(1.0, 1.0)
    return lambda: bytes(size - _BYTES_OVERHEAD)
