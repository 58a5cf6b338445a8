"""One forward of a packed batch through an unmodified Hugging Face causal model.

Sequences lie behind one another in one row, each with positions of its own. Models of transformers
see from restarting positions that the row is packed, and mask accordingly; flash attention takes
the bounds. Only where prefixes are shared is the mask ours::

    keys        p  q  a | q  c          sees: its own sequence, up to itself,
    query  a    1  1  1 | .  .                and the prefix that is named for it
           q    1  .  . | 1  .          <- q at its old position, again: after p, as the first q
           c    1  .  . | 1  1

Legend: T tokens of the batch, B sequences, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thor_fast.errors import ConfigError
from thor_fast.rl.batching import TrainingBatch

__all__ = ["attention_mask", "hidden_states", "position_ids"]

# Implementations for which transformers masks packed rows, and kinds of layers that it can mask.
_PACKED = ("sdpa", "eager", "flex_attention")
_MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_TAKES_A_MASK = ("sdpa", "eager")


def hidden_states(model: nn.Module, batch: TrainingBatch) -> torch.Tensor:
    """Run the batch; the head runs on one row only, and the loss has it for itself.

    Args:
        model: a ``PreTrainedModel`` with a causal head, or such a model in peft's, DDP's or FSDP2's
            hands. It is called as it is, so that their hooks and autocast apply; gradient
            checkpointing and dropout are as it has them.
        batch: see :class:`~thor_fast.rl.batching.TrainingBatch`; it may be on another device.

    Returns:
        [T, H] in the dtype of the model's last layer: row t of token t. No row depends on a token
        of another sequence, but for the prefix that ``batch.prefix`` names.

    Raises:
        ConfigError: the model keeps a state from token to token, which would pass from sequence to
            sequence; or prefixes are shared, and its attention takes no mask of ours.
    """
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    attention = inner.config._attn_implementation  # noqa: SLF001 (transformers has no other way)
    _check_isolates(inner, attention)
    embedding = inner.get_input_embeddings().weight
    device = embedding.device
    inputs: dict[str, Any] = {
        "input_ids": batch.token_ids[None].to(device),
        "position_ids": position_ids(batch, device)[None],
        "use_cache": False,
        "logits_to_keep": 1,
    }
    if batch.prefix is not None:
        _check_takes_a_mask(inner.config, attention)
        allowed = attention_mask(batch, device)[None, None]
        if attention == "eager":  # which adds it
            least = torch.finfo(embedding.dtype).min
            allowed = torch.zeros_like(allowed, dtype=embedding.dtype).masked_fill(~allowed, least)
        inputs["attention_mask"] = allowed
    elif "flash" in attention:
        bounds = batch.cu_seqlens.to(device, torch.int32)
        longest = int(batch.cu_seqlens.diff().max())
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
    found: list[torch.Tensor] = []
    hook = inner.get_decoder().register_forward_hook(
        lambda _module, _inputs, output: found.append(output.last_hidden_state)
    )
    try:
        model(**inputs)
    finally:
        hook.remove()
    return found[0][0]


def position_ids(batch: TrainingBatch, device: torch.device | str = "cpu") -> torch.Tensor:
    """[T] int64: each sequence counts from 0, or from the length of the prefix it shares."""
    first = batch.cu_seqlens[:-1]
    if batch.prefix is not None:
        first = first - batch.prefix[:, 1]
    return _rows(batch, device) - _by_row(first, batch, device)


def attention_mask(batch: TrainingBatch, device: torch.device | str = "cpu") -> torch.Tensor:
    """[T, T] bool: whether the query (row) sees the key (column)."""
    key, query = _rows(batch, device), _rows(batch, device)[:, None]
    seen = (_by_row(batch.cu_seqlens[:-1], batch, device)[:, None] <= key) & (key <= query)
    if batch.prefix is None:
        return seen
    start, length = _by_row(batch.prefix, batch, device)[..., None].unbind(1)
    return seen | ((start <= key) & (key < start + length))


def _rows(batch: TrainingBatch, device: torch.device | str) -> torch.Tensor:
    return torch.arange(len(batch.token_ids), device=device)


def _by_row(values: torch.Tensor, batch: TrainingBatch, device: torch.device | str) -> torch.Tensor:
    """[T, ...] of what [B, ...] says about each sequence."""
    return values.repeat_interleave(batch.cu_seqlens.diff(), dim=0).to(device)


def _check_isolates(model: Any, attention: str) -> None:
    if attention not in _PACKED and "flash" not in attention:
        raise ConfigError(
            f"the attention is {attention!r}, expected one that masks packed sequences: flash "
            f"attention or one of {', '.join(_PACKED)}"
        )
    other = set(getattr(model.config, "layer_types", None) or ()) - _MASKED_LAYERS
    if other or model._is_stateful:  # noqa: SLF001 (likewise)
        raise ConfigError(
            f"the model has layers of kind {', '.join(sorted(other)) or 'recurrent'}, expected "
            "attention only: their state would pass from one packed sequence to the next"
        )


def _check_takes_a_mask(config: Any, attention: str) -> None:
    if attention not in _TAKES_A_MASK:
        raise ConfigError(
            f"the attention is {attention!r}, expected one that takes a mask for "
            f"shared prefixes: {' or '.join(_TAKES_A_MASK)}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None) is not None:
        raise ConfigError(
            "the model has layers that see a window only, expected full attention for shared "
            "prefixes: one mask is given to all layers"
        )
