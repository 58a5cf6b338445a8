"""A paged KV cache as strides and base pointers, whoever allocated it.

Legend: L layers, NB blocks, BS slots (tokens) of a block, H key/value heads, D head width (DK of a
key, DV of a value). ``slot = block * BS + offset``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

__all__ = ["KVView"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False, slots=True)
class KVView:
    """Keys [NB, BS, H, DK] and values [NB, BS, H, DV] of each layer; it keeps them alive.

    Strides are whatever they are, but 1 in the last dimension and the same in every layer. Made by
    :meth:`stacked`, :meth:`pools`, :meth:`packed_layers` or :meth:`vllm`.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit; the message says which.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    whole_blocks: bool = False
    """What is inside a block is unknown: only copies of whole blocks are right."""
    table: torch.Tensor = field(init=False, repr=False)
    """[2, 3 + L] int64 on the cache's device, of keys and of values: strides of a block, a token
    and a head in numbers, then the layers' addresses."""
    packed: bool = field(init=False)
    """A head's value lies right behind its key, in every layer."""
    alignment: int = field(init=False)
    """Bytes, at most 16, that divide every address and stride."""

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"got keys of {len(self.keys)} layers and values of {len(self.values)}, expected "
                "as many of both, and at least one"
            )
        for name, tensors in (("keys", self.keys), ("values", self.values)):
            _check_alike(name, tensors)
        key, value = self.keys[0], self.values[0]
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"values have shape {tuple(value.shape)}, expected (NB, BS, H, DV) with "
                f"{tuple(key.shape[:3])} to match keys {tuple(key.shape)}"
            )
        if value.dtype is not key.dtype or value.device != key.device:
            raise ValueError(
                f"values are {value.dtype} on {value.device}, expected {key.dtype} on "
                f"{key.device} like keys"
            )
        if self.blocks * self.block_size >= 2**31:
            raise ValueError(
                f"there are {self.blocks} blocks of {self.block_size} tokens, expected below 2^31 "
                "tokens: a slot's number has 32 bits"
            )
        rows = [
            [*kind[0].stride()[:3], *(t.data_ptr() for t in kind)]
            for kind in (self.keys, self.values)
        ]
        table = torch.tensor(rows, dtype=torch.int64).to(key.device)
        object.__setattr__(self, "table", table)
        size = key.element_size()
        behind = [a + size * self.widths[0] for a in rows[0][3:]] == rows[1][3:]
        object.__setattr__(self, "packed", behind and rows[0][:3] == rows[1][:3])
        strides = [size * stride for row in rows for stride in row[:3]]
        addresses = [address for row in rows for address in row[3:]]
        object.__setattr__(self, "alignment", math.gcd(16, *strides, *addresses))

    @property
    def layers(self) -> int:
        """L."""
        return len(self.keys)

    @property
    def blocks(self) -> int:
        """NB."""
        return self.keys[0].shape[0]

    @property
    def block_size(self) -> int:
        """BS, in tokens."""
        return self.keys[0].shape[1]

    @property
    def heads(self) -> int:
        """H."""
        return self.keys[0].shape[2]

    @property
    def widths(self) -> tuple[int, int]:
        """DK and DV."""
        return self.keys[0].shape[3], self.values[0].shape[3]

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.keys[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys[0].dtype

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, keys and values."""
        return self.layers * self.heads * sum(self.widths) * self.keys[0].element_size()

    def shares_memory(self, other: KVView) -> bool:
        """Whether any allocation holds parts of both."""
        mine, theirs = (
            {t.untyped_storage().data_ptr() for t in (*view.keys, *view.values)}
            for view in (self, other)
        )
        return bool(mine & theirs)

    @classmethod
    def stacked(cls, kv: torch.Tensor) -> KVView:
        """Of one tensor [L, 2, NB, BS, H, D], keys first."""
        if kv.ndim != 6 or kv.shape[1] != 2:
            raise ValueError(f"kv has shape {tuple(kv.shape)}, expected (L, 2, NB, BS, H, D)")
        return cls(kv[:, 0].unbind(0), kv[:, 1].unbind(0))

    @classmethod
    def pools(
        cls,
        keys: torch.Tensor | Sequence[torch.Tensor],
        values: torch.Tensor | Sequence[torch.Tensor],
    ) -> KVView:
        """Of keys and values apart: [L, NB, BS, H, D] tensors, or one [NB, BS, H, D] per layer."""
        return cls(tuple(keys), tuple(values))

    @classmethod
    def packed_layers(cls, layers: Sequence[torch.Tensor], head_width: int) -> KVView:
        """Of one tensor [NB, H, BS, 2 D] per layer, each head's key and value side by side.

        The logical shape of vLLM >= 0.32; in which physical order the dimensions of all layers lie
        (LBHNC, LBNHC, LHBNC, BLHNC, BLNHC or BHLNC) is in the strides.
        """
        for layer, tensor in enumerate(layers):
            if tensor.ndim != 4 or tensor.shape[3] != 2 * head_width:
                raise ValueError(
                    f"layer {layer} has shape {tuple(tensor.shape)}, expected "
                    f"(NB, H, BS, {2 * head_width}): a key and a value of {head_width} per head"
                )
        tokens_first = [tensor.transpose(1, 2) for tensor in layers]
        return cls(
            tuple(t[..., :head_width] for t in tokens_first),
            tuple(t[..., head_width:] for t in tokens_first),
        )

    @classmethod
    def vllm(cls, kv_caches: Sequence[torch.Tensor], head_width: int) -> KVView:
        """Of a vLLM runner's ``kv_caches`` (0.32 and 0.33), those of one KV cache group.

        A block here is one of theirs as attention sees it: where a manager's block is several of
        them (``kernel_blocks_per_block``), multiply its number. On CPU vLLM keeps keys transposed
        inside a block, differently by instruction set: such a view can only copy whole blocks.
        Caches of another form (MLA's latents, states of linear attention) are refused.
        """
        view = cls.packed_layers(kv_caches, head_width)
        return replace(view, whole_blocks=view.device.type == "cpu")


def _check_alike(name: str, tensors: Sequence[torch.Tensor]) -> None:
    first = tensors[0]
    if first.ndim != 4 or 0 in first.shape:
        raise ValueError(
            f"{name} of layer 0 have shape {tuple(first.shape)}, expected (NB, BS, H, D), none of "
            "them 0"
        )
    if first.stride(3) != 1:
        raise ValueError(
            f"{name} have strides {first.stride()}, expected 1 in the last dimension: a head's "
            "numbers lie side by side"
        )
    if first.dtype not in _DTYPES:
        raise ValueError(
            f"{name} are {first.dtype}, expected float32, bfloat16, float16 or float64: a "
            "quantised cache has scales that this view does not know"
        )
    for layer, tensor in enumerate(tensors):
        found, expected = ((tuple(t.shape), t.stride(), t.dtype, t.device) for t in (tensor, first))
        if found != expected:
            raise ValueError(
                f"{name} of layer {layer} have (shape, strides, dtype, device) {found}, expected "
                f"{expected} as in layer 0"
            )
