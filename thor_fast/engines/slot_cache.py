"""KV storage in slots, and the attention that reads it: what one step of the engine runs on.

Legend: S slots, C context positions per slot, T tokens of one step, R decoding rows, L longest
context among them, Hq query heads, Hkv key/value heads, G = Hq / Hkv, D head width.

A step is *packed*: the new tokens of all sequences, one each from those that decode and a chunk
from those that prefill, stand one behind the other in a batch of one, ``[1, T]``. Everything but
attention is token-wise, so nothing is padded. Attention reaches us through transformers'
``AttentionInterface``, which hands on unknown keyword arguments: neither the model's code nor
transformers' ``Cache`` classes are involved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from thor_fast.errors import EngineError

__all__ = ["Chunk", "SlotCache", "StepBatch", "forward", "probe", "shadow"]

_NAME = "thor_fast_slots"


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence: ``ids`` go to positions ``start ...`` of ``slot``."""

    slot: int
    start: int
    ids: Sequence[int]


class _Attends(Protocol):
    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    slot_step: _Attends,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in each layer: ``query`` [1, Hq, T, D] to [1, T, Hq, D]."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise EngineError(
                f"{type(module).__name__} asks for {name}={options[name]!r}, "
                "expected plain causal attention"
            )
    return slot_step.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


AttentionInterface.register(_NAME, _attention)


def shadow(model: PreTrainedModel) -> PreTrainedModel:
    """A second set of modules over the *same* parameters and buffers, with our attention.

    Attention is chosen by the config and dropout by a flag on each module. Switching those on the
    caller's own model would break a forward of his that runs on another thread at the same time;
    the shadow has a config and flags of its own and costs no memory to speak of. It follows
    in-place updates of the weights, not their replacement by new tensors.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation(_NAME)
    twin.eval()  # type: ignore[no-untyped-call]
    return twin


def forward(model: PreTrainedModel, batch: StepBatch) -> torch.Tensor:
    """Logits [n, V] of a :func:`shadow` after each of the step's chunks; writes KV on the way."""
    out = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.last,
        slot_step=batch,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


class _Probe:
    """Stands in for a step: notes the shapes of each layer's keys."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if key.shape != value.shape:
            raise EngineError(
                f"layer {layer} has keys {tuple(key.shape)} and values {tuple(value.shape)}, "
                "expected the same shape"
            )
        self.keys[layer] = key
        return query.transpose(1, 2)


def probe(model: PreTrainedModel) -> torch.Tensor:
    """One layer's keys [1, Hkv, 1, D] for one token: what a cache must hold, in which dtype.

    ``model`` is a :func:`shadow`. Raises ``EngineError`` where the model's attention does not come
    to us in every layer.
    """
    seen = _Probe()
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, position_ids=token, use_cache=False, slot_step=seen)
    layers = model.config.num_hidden_layers
    shapes = {tuple(key.shape) for key in seen.keys.values()}
    if sorted(seen.keys) != list(range(layers)) or len(shapes) != 1:
        raise EngineError(
            f"{type(model).__name__} sent {len(seen.keys)} of {layers} layers through "
            f"transformers' attention interface, with key shapes {sorted(shapes)}; "
            "expected all of them, with one shape"
        )
    return seen.keys[0]


class SlotCache:
    """Keys and values of S sequences of at most C tokens, allocated once.

    One tensor [layers, 2, S, C, Hkv, D]. Positions come before heads: a step writes whole rows with
    one ``index_copy_``, and attention on CPU reads this layout 1.1 to 1.4 times faster than
    heads-first.
    """

    def __init__(self, slots: int, context: int, layers: int, like: torch.Tensor) -> None:
        heads, width = like.shape[1], like.shape[3]
        self.slots, self.context = slots, context
        self.device = like.device
        # Zeros, not empty: the masked tail of a row is multiplied by 0, and 0 * NaN is NaN.
        self._kv = torch.zeros(
            (layers, 2, slots, context, heads, width), dtype=like.dtype, device=like.device
        )
        # Indexing the big tensor in every layer of every step would cost as much as the write.
        self._layers = [(kv[0], kv[1], kv[0].flatten(0, 1), kv[1].flatten(0, 1)) for kv in self._kv]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot."""
        self._kv[:, :, target, :length] = self._kv[:, :, source, :length]

    def write(
        self, layer: int, where: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Put [1, Hkv, T, D] keys and values at flat positions ``where`` [T] (slot * C + pos)."""
        _, _, keys, values = self._layers[layer]
        keys.index_copy_(0, where, key[0].transpose(0, 1))
        values.index_copy_(0, where, value[0].transpose(0, 1))

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, C, Hkv, D] of one layer."""
        return self._layers[layer][0], self._layers[layer][1]


class StepBatch:
    """The tensors of one step, built once and read by every layer.

    ``chunks`` in the order of the packed sequence; those of one token (decoding rows) must come
    first and in ascending slot order. ``input_ids`` and ``position_ids`` are [1, T] int64, ``last``
    is [n] int64: where each chunk ends.
    """

    def __init__(self, cache: SlotCache, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        sizes = [len(chunk.ids) for chunk in chunks]
        self._rows = next((i for i, n in enumerate(sizes) if n > 1), len(sizes))
        total = sum(sizes)
        ends = np.cumsum(sizes)
        # One host-to-device copy per step: ids, positions, flat positions, chunk ends.
        packed = np.empty(3 * total + len(chunks), np.int64)
        packed[:total] = [token for chunk in chunks for token in chunk.ids]
        starts = np.array([chunk.start for chunk in chunks])
        slots = np.array([chunk.slot for chunk in chunks])
        offsets = np.arange(total) - np.repeat(ends - sizes, sizes)
        packed[total : 2 * total] = np.repeat(starts, sizes) + offsets
        packed[2 * total : 3 * total] = (
            np.repeat(slots, sizes) * cache.context + packed[total : 2 * total]
        )
        packed[3 * total :] = ends - 1
        tensors = torch.from_numpy(packed).to(cache.device)
        self.input_ids = tensors[None, :total]
        self.position_ids = tensors[None, total : 2 * total]
        self._where = tensors[2 * total : 3 * total]
        self.last = tensors[3 * total :]
        self._decode = (
            _DecodeRows(cache, slots[: self._rows], starts[: self._rows] + 1)
            if self._rows
            else None
        )
        self._prefill = [
            _PrefillRow(cache, chunk, int(end)) for chunk, end in zip(chunks, ends, strict=True)
        ][self._rows :]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Write this step's keys and values, then attend: [1, Hq, T, D] to [1, T, Hq, D]."""
        self._cache.write(layer, self._where, key, value)
        keys, values = self._cache.layer(layer)
        packed = query[0].transpose(0, 1)
        parts = []
        if self._decode is not None:
            parts.append(self._decode.attend(packed[: self._rows], keys, values, scale))
        parts += [row.attend(packed, keys, values, scale) for row in self._prefill]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


class _DecodeRows:
    """One query token from each of R slots, as one batched attention.

    The rows of the cache are used in place where the live slots are dense, since gathering copies
    more bytes than attention reads; rows in between that do not decode are computed and dropped.
    """

    def __init__(
        self, cache: SlotCache, slots: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]
    ) -> None:
        span = int(slots[-1]) + 1
        self._length = int(lengths.max())
        self._in_place = 2 * len(slots) >= span
        self._exact = len(slots) == span
        self._span = span
        if self._in_place:
            # A row that does not decode looks at one position: with none, softmax gives NaN.
            visible = np.ones(span, np.int64)
            visible[slots] = lengths
        else:
            visible = lengths
        self._slots = torch.from_numpy(slots).to(cache.device)
        limit = torch.from_numpy(visible).to(cache.device)
        hidden = torch.arange(self._length, device=cache.device) >= limit[:, None]
        self._mask: torch.Tensor | None = None
        if int(visible.min()) < self._length:
            mask = torch.zeros(hidden.shape, dtype=cache.layer(0)[0].dtype, device=cache.device)
            self._mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[R, Hq, D] to [R, Hq, D]. Query heads that share a key head become its query rows."""
        rows, heads, width = query.shape
        shared = query.reshape(rows, keys.shape[2], -1, width)
        if self._in_place:
            k, v = keys[: self._span, : self._length], values[: self._span, : self._length]
            if not self._exact:
                spread = shared.new_zeros((self._span, *shared.shape[1:]))
                shared = spread.index_copy_(0, self._slots, shared)
        else:
            k, v = keys[self._slots, : self._length], values[self._slots, : self._length]
        out = F.scaled_dot_product_attention(
            shared, k.transpose(1, 2), v.transpose(1, 2), attn_mask=self._mask, scale=scale
        )
        if self._in_place and not self._exact:
            out = out.index_select(0, self._slots)
        return out.reshape(rows, heads, width)


class _PrefillRow:
    """Several query tokens of one slot."""

    def __init__(self, cache: SlotCache, chunk: Chunk, end: int) -> None:
        self._slot = chunk.slot
        self._tokens = slice(end - len(chunk.ids), end)
        self._length = chunk.start + len(chunk.ids)
        self._mask: torch.Tensor | None = None
        if chunk.start:
            shape = (len(chunk.ids), self._length)
            self._mask = torch.ones(shape, dtype=torch.bool, device=cache.device).tril_(chunk.start)

    def attend(
        self, packed: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[T, Hq, D] of the whole step to [n, Hq, D] of this row."""
        query = packed[self._tokens].transpose(0, 1)[None]
        groups = query.shape[1] // keys.shape[2]
        k = keys[None, self._slot, : self._length].transpose(1, 2)
        v = values[None, self._slot, : self._length].transpose(1, 2)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(
            query, k, v, attn_mask=self._mask, is_causal=self._mask is None, scale=scale
        )
        return out[0].transpose(0, 1)
