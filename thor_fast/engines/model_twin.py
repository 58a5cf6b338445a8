"""A Hugging Face causal LM as a step of the engine runs it: unmodified, with our attention.

Legend: T tokens of one step, Hq query heads, Hkv key/value heads, D head width, V vocabulary.

A step is *packed*: the new tokens of all sequences, one each from those that decode and a chunk
from those that prefill, stand one behind the other in a batch of one, ``[1, T]``. Everything but
attention is token-wise, so nothing is padded. Attention reaches us through transformers'
``AttentionInterface``, which hands on unknown keyword arguments: neither the model's code nor
transformers' ``Cache`` classes are involved.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from thor_fast.errors import EngineError

__all__ = ["Heads", "Step", "forward", "probe", "shadow"]

_NAME = "thor_fast_paged"


class Step(Protocol):
    """The tensors of one forward, and the attention over them.

    ``input_ids`` and ``position_ids`` are [1, T] int64, ``last`` is [n] int64: the tokens after
    which logits are wanted.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """``query`` [1, Hq, T, D], ``key`` and ``value`` [1, Hkv, T, D] to [1, T, Hq, D]."""
        ...


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    paged_step: Step,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in each layer: ``query`` [1, Hq, T, D] to [1, T, Hq, D]."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise EngineError(
                f"{type(module).__name__} asks for {name}={options[name]!r}, "
                "expected plain causal attention"
            )
    return paged_step.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


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


def forward(model: PreTrainedModel, step: Step) -> torch.Tensor:
    """Logits [n, V] of a :func:`shadow` after each of the step's ``last`` tokens."""
    out = model(
        input_ids=step.input_ids,
        position_ids=step.position_ids,
        use_cache=False,
        logits_to_keep=step.last,
        paged_step=step,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention looks like in every layer.

    ``keys`` [1, Hkv, 1, D]: those of one token in one layer: what a cache must hold, in which
    dtype, where. ``queries``: Hq. ``scale``: that of the scores; ``None`` where layers differ.
    """

    keys: torch.Tensor
    queries: int
    scale: float | None


class _Probe:
    """Stands in for a step of one token: notes what each layer's attention is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.heads: dict[int, Heads] = {}
        self.input_ids = self.position_ids = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self.last = self.input_ids[0]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if key.shape != value.shape:
            raise EngineError(
                f"layer {layer} has keys {tuple(key.shape)} and values {tuple(value.shape)}, "
                "expected the same shape"
            )
        self.heads[layer] = Heads(key, query.shape[1], scale)
        return query.transpose(1, 2)


def probe(model: PreTrainedModel) -> Heads:
    """Run one token through a model to learn its heads.

    ``model`` is a :func:`shadow`. Raises ``EngineError`` where the model's attention does not come
    to us in every layer.
    """
    seen = _Probe(model.device)
    with torch.inference_mode():
        forward(model, seen)
    layers = model.config.num_hidden_layers
    shapes = {tuple(heads.keys.shape) for heads in seen.heads.values()}
    if sorted(seen.heads) != list(range(layers)) or len(shapes) != 1:
        raise EngineError(
            f"{type(model).__name__} sent {len(seen.heads)} of {layers} layers through "
            f"transformers' attention interface, with key shapes {sorted(shapes)}; "
            "expected all of them, with one shape"
        )
    first = seen.heads[0]
    alike = all((h.queries, h.scale) == (first.queries, first.scale) for h in seen.heads.values())
    return first if alike else replace(first, scale=None)
