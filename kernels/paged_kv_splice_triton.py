"""The splice as one Triton launch: all layers, keys and values, a whole batch of plans.

A program owns one lane of one layer, its keys or its values: it walks the lane's segments in their
order, and the tokens of a segment upwards. Where a plan does not overlap itself each segment is a
lane. See ``paged_kv_splice_reference``, the twin.

Legend: n segments, m lanes, L layers, H heads, D head width, R rotated width of a key.
"""

# Triton has no type information, and a kernel's pointers have no Python type.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .paged_kv_splice_plan import SplicePlan
from .paged_kv_splice_view import KVView

__all__ = ["INTERPRETED", "NUM_WARPS", "splice_kernel", "splice_triton", "tile_rows"]

# 16 KiB by 256 threads are four loads of 128 bits in flight per thread: with the eight programs
# that fit a multiprocessor, more than the latency of its memory asks for.
TILE_BYTES = 16384
NUM_WARPS = 8
# Of keys that are turned, in float32: 16 per thread, and still 128 bits to a load.
TURNED_NUMBERS = 4096

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _tensor(table_ptr, layers, kind, layer, numbers: tl.constexpr, unit: tl.constexpr):
    """Base pointer and strides of one layer's keys (kind 0) or values; see ``KVView.table``."""
    row = table_ptr + kind * (3 + layers)
    base = tl.load(row + 3 + layer).to(tl.pointer_type(numbers))
    base = tl.multiple_of(base, unit * (numbers.primitive_bitwidth // 8))
    # What the host has found out about every stride: without it loads are one number wide.
    block = tl.load(row) // unit * unit
    token = tl.load(row + 1) // unit * unit
    head = tl.load(row + 2) // unit * unit
    return base, block, token, head


@triton.jit
def _rows(place, slot, size, token, head):
    """Pointers to the tokens' heads behind a slot."""
    base, by_block, by_token, by_head = place
    # 64 bits: a pool of 100 GB has more numbers than 32 can count.
    block = (slot // size).to(tl.int64)
    offset = (slot % size).to(tl.int64) + token
    return base + (block * by_block + offset * by_token + head.to(tl.int64) * by_head)


@triton.jit
def _copy(source, target, inside, first: tl.constexpr, last: tl.constexpr, alone: tl.constexpr):
    """Columns first ... last - 1 of rows of pointers."""
    columns = first + tl.arange(0, triton.next_power_of_2(last - first))
    mask = inside[:, None] & (columns < last)[None, :]
    numbers = tl.load(source[:, None] + columns[None, :], mask=mask)
    if alone:
        # What one thread stores may be where another has yet to load.
        tl.debug_barrier()
    tl.store(target[:, None] + columns[None, :], numbers, mask=mask)


@triton.jit
def _turn(source, target, inside, turns_ptr, half: tl.constexpr, alone: tl.constexpr):
    """Pairs (i, i + half)."""
    pair = tl.arange(0, triton.next_power_of_2(half))
    there = pair < half
    cosine = tl.load(turns_ptr + 2 * pair, mask=there, other=0.0)[None, :]
    sine = tl.load(turns_ptr + 2 * pair + 1, mask=there, other=0.0)[None, :]
    mask = inside[:, None] & there[None, :]
    near = source[:, None] + pair[None, :]
    # Interpreters have no arithmetic of their own for bfloat16: float32 first.
    first = tl.load(near, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(near + half, mask=mask, other=0.0).to(tl.float32)
    if alone:
        tl.debug_barrier()
    goal = target[:, None] + pair[None, :]
    numbers = goal.dtype.element_ty
    tl.store(goal, (first * cosine - second * sine).to(numbers), mask=mask)
    tl.store(goal + half, (second * cosine + first * sine).to(numbers), mask=mask)


@triton.jit
def _turn_neighbours(source, target, inside, turns_ptr, half: tl.constexpr, alone: tl.constexpr):
    """Pairs (2i, 2i + 1)."""
    pairs: tl.constexpr = triton.next_power_of_2(half)
    columns = tl.arange(0, 2 * pairs)
    there = columns < 2 * half
    turns = tl.load(turns_ptr + columns, mask=there, other=0.0)
    cosine, sine = tl.split(tl.reshape(turns, (pairs, 2)))
    mask = inside[:, None] & there[None, :]
    numbers = tl.load(source[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if alone:
        tl.debug_barrier()
    first, second = tl.split(tl.reshape(numbers, (numbers.shape[0], pairs, 2)))
    turned = tl.join(
        first * cosine[None, :] - second * sine[None, :],
        second * cosine[None, :] + first * sine[None, :],
    )
    goal = target[:, None] + columns[None, :]
    turned = tl.reshape(turned, numbers.shape).to(goal.dtype.element_ty)
    tl.store(goal, turned, mask=mask)


@triton.jit
def splice_kernel(
    segments_ptr,  # [n, 4] int32
    lanes_ptr,  # [m + 1] int32
    tables_ptr,  # [L] int32: each layer's table of rotations, or -1
    rotations_ptr,  # [ids * tables, R/2, 2] float32
    target_ptr,  # [2, 3 + L] int64, see KVView.table
    source_ptr,  # [2, 3 + L] int64
    target_size,  # tokens of a block
    source_size,
    layers,
    tables,  # of rotations
    numbers: tl.constexpr,  # dtype
    unit: tl.constexpr,  # divides every stride and address
    heads: tl.constexpr,  # that one program copies
    kinds: tl.constexpr,  # 1: keys and values are one row of key_width
    key_width: tl.constexpr,
    value_width: tl.constexpr,
    turned: tl.constexpr,  # R, or 0
    interleaved: tl.constexpr,
    alone: tl.constexpr,  # what is read may be written: one program per lane, layer and head
    tile: tl.constexpr,  # rows (of one token and head) at once
):
    """Copies what the plan says; keys of segments with a rotation are turned on the way."""
    lane = tl.program_id(0)
    layer = tl.program_id(1)
    kind = tl.program_id(2) % kinds
    first_head = tl.program_id(2) // kinds * heads
    target = _tensor(target_ptr, layers, kind, layer, numbers, unit)
    source = _tensor(source_ptr, layers, kind, layer, numbers, unit)
    table = tl.load(tables_ptr + layer) if turned > 0 else -1
    lanes = tl.arange(0, tile)
    for segment in range(tl.load(lanes_ptr + lane), tl.load(lanes_ptr + lane + 1)):
        read = tl.load(segments_ptr + 4 * segment)
        written = tl.load(segments_ptr + 4 * segment + 1)
        rows = tl.load(segments_ptr + 4 * segment + 2) * heads
        rotation = tl.load(segments_ptr + 4 * segment + 3)
        if (table < 0) | (kind == 1):
            rotation = -1
        turns_ptr = rotations_ptr + (rotation * tables + table).to(tl.int64) * turned
        for start in range(0, rows, tile):
            row = start + lanes
            inside = row < rows
            head = first_head + row % heads
            goal = _rows(target, written, target_size, row // heads, head)
            from_ = _rows(source, read, source_size, row // heads, head)
            # What is copied to where it is stays; only keys are turned there.
            stays = alone and read == written
            if kind == 1:
                if not stays:
                    _copy(from_, goal, inside, 0, value_width, alone)
            elif rotation < 0:
                if not stays:
                    _copy(from_, goal, inside, 0, key_width, alone)
            else:
                if turned > 0:
                    if interleaved:
                        _turn_neighbours(from_, goal, inside, turns_ptr, turned // 2, alone)
                    else:
                        _turn(from_, goal, inside, turns_ptr, turned // 2, alone)
                    if key_width > turned and not stays:
                        _copy(from_, goal, inside, turned, key_width, alone)


INTERPRETED = isinstance(splice_kernel, InterpretedFunction)
"""True where ``TRITON_INTERPRET=1`` was set at import: kernels run on CPU tensors, slowly."""


def tile_rows(width: int, size: int, turned: int, alignment: int) -> int:
    """Rows of ``width`` numbers of ``size`` bytes that a program copies at once, a power of two.

    What is turned of them (R = ``turned``, or 0) is held in float32: there are fewer then. Fewer
    too where the alignment in bytes makes loads narrow: the number of loads stays.
    """
    rows: int = TILE_BYTES // (triton.next_power_of_2(width) * size)
    if turned:
        rows = min(rows, TURNED_NUMBERS // triton.next_power_of_2(turned))
    return max(1, rows * alignment // 16)


def splice_triton(view: KVView, plan: SplicePlan, source: KVView, *, alone: bool) -> None:
    """One launch and one copy of the plan to the device; no host sync.

    ``alone``: the plan reads slots that it writes.
    """
    lanes = plan.lane_starts if alone else np.arange(len(plan) + 1, dtype=np.int32)
    turned = plan.rope.width if plan.rope is not None and plan.rotates else 0
    layers = (0,) * view.layers
    if plan.rope is not None and plan.rope.layers:
        layers = plan.rope.layers
    parts = [plan.segments.ravel(), lanes, np.array(layers, np.int32)]
    parts.append(plan.rotations.ravel().view(np.int32) if turned else np.zeros(1, np.int32))
    segments, starts, tables, rotations = _upload(parts, view.device)
    one = view.packed and source.packed
    key_width, value_width = view.widths
    widest = key_width + value_width if one else max(view.widths)
    size = view.keys[0].element_size()
    alignment = min(view.alignment, source.alignment)
    heads = 1 if alone else view.heads
    grid = (len(lanes) - 1, view.layers, (1 if one else 2) * view.heads // heads)
    splice_kernel[grid](
        segments,
        starts,
        tables,
        rotations.view(torch.float32),
        view.table,
        source.table,
        view.block_size,
        source.block_size,
        view.layers,
        len(plan.rope.frequencies) if plan.rope is not None else 1,
        _TYPES[view.dtype],
        alignment // size,
        heads,
        1 if one else 2,
        key_width + value_width if one else key_width,
        value_width,
        turned,
        plan.rope.interleaved if plan.rope is not None else False,
        alone,
        tile_rows(widest, size, turned, alignment),
        num_warps=NUM_WARPS,
    )


def _upload(parts: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Int32 arrays to the device, in one copy that nobody waits for."""
    sizes = [-(-part.size // 4) * 4 for part in parts]  # each begins at a multiple of 16 bytes
    buffer = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    places = torch.split(buffer, sizes)
    for part, place in zip(parts, places, strict=True):
        place[: part.size] = torch.from_numpy(part)
    return list(torch.split(buffer.to(device, non_blocking=True), sizes))
