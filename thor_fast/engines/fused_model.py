"""The same forward in fewer and faster operations: Llama, Qwen2, Qwen3 and their like on a CPU.

Legend: T tokens of one step, H hidden width, Hq query heads, Hkv key/value heads, D head width.

A decode step of a small model spends more time between the matrix products than in them, and
those are slow where few rows meet a weight stored row by row. So the weights are copied once:
queries, keys and values become one product, gate and up another, each stored column by column.
One core, 4.7 M parameters, 8 rows: 3.6 ms of products as they are, 1.9 ms column by column; 64
rows: 10.4 and 7.1 ms.

Which models have this form is not looked up in a list of names: the copy is compared with its
model, on a few tokens, whenever one is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from thor_fast.engines.model_twin import Step, forward

__all__ = ["FusedModel", "fuse"]

_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Of the largest logit. Another order of summation gives 1e-6, another formula 1e-1.
_TOLERANCE = 1e-3


def fuse(twin: nn.Module) -> FusedModel | None:
    """The fused form of a :func:`~thor_fast.engines.model_twin.shadow`, over copies of its weights.

    ``None`` where it would not be the same: modules of another kind (adapters, experts), hooks,
    logits that differ; and where it was not measured to help, off a CPU or not in float32.
    """
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in twin.parameters()):
        return None
    if any(_has_hooks(module) for module in twin.modules()) or not _has_known_parts(twin):
        return None
    with torch.inference_mode():
        fused = FusedModel(twin)
        step = _Comparison(fused.vocabulary)
        expected, got = forward(twin, step), fused.forward(step)  # type: ignore[arg-type]
        error, largest = (got - expected).abs().max(), expected.abs().max()
    return fused if bool(error <= _TOLERANCE * largest) else None


def _has_hooks(module: nn.Module) -> bool:
    # Torch has no public way to ask.
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def _has_known_parts(twin: Any) -> bool:
    if _children(twin) != {"model", "lm_head"} or _children(twin.model) != _MODEL:
        return False
    for layer in twin.model.layers:
        if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
            return False
        if _children(layer.self_attn) - {"q_norm", "k_norm"} != _ATTENTION:
            return False
        linear = [getattr(layer.self_attn, name) for name in _ATTENTION]
        linear += [getattr(layer.mlp, name) for name in _MLP - {"act_fn"}]
        if any(type(module) is not nn.Linear for module in linear):
            return False
        norms = [m for n, m in layer.named_modules() if n.endswith("norm")]
        if not all(hasattr(norm, "variance_epsilon") for norm in norms):
            return False
    return type(twin.lm_head) is nn.Linear and hasattr(twin.model.norm, "variance_epsilon")


def _children(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


class _Comparison:
    """A step of one sequence whose attention needs no cache."""

    def __init__(self, vocabulary: int) -> None:
        self.position_ids = torch.arange(8)[None]
        self.input_ids = self.position_ids % vocabulary
        self.last = self.position_ids[0]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)


class _Product:
    """One product in place of several of the same input."""

    def __init__(self, *parts: nn.Linear) -> None:
        weight = torch.cat([part.weight for part in parts]).t().contiguous()
        self.weight = weight.t()  # [out, in], column by column
        self.bias: torch.Tensor | None = None
        if any(part.bias is not None for part in parts):
            zeros = [part.weight.new_zeros(part.out_features) for part in parts]
            pairs = zip(parts, zeros, strict=True)
            self.bias = torch.cat(tuple(z if p.bias is None else p.bias for p, z in pairs))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``residual + self(x)``, in place."""
        residual.addmm_(x, self.weight.t())
        return residual if self.bias is None else residual.add_(self.bias)


class _Norm:
    """A root-mean-square norm over the last dimension."""

    def __init__(self, module: Any) -> None:
        self.weight: torch.Tensor = module.weight.clone()
        self.eps: float = module.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class _Rotary:
    """One step's angles, each [T, 1, D]: the sine with the sign that rotating halves gives it."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate ``x`` [T, heads, D]."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class _Layer:
    """One decoder layer: attention and a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scale = int(attention.layer_idx), float(attention.scaling)
        self.width = int(attention.head_dim)
        self.queries = attention.q_proj.out_features // self.width
        self.keys = attention.k_proj.out_features // self.width
        self.input_norm = _Norm(layer.input_layernorm)
        self.qkv = _Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.head_norm: _Norm | None = None
        if hasattr(attention, "q_norm"):
            self.head_norm = _Norm(attention.q_norm)
            # [Hq + Hkv, D]: queries and keys in one go.
            rows = [attention.q_norm.weight] * self.queries + [attention.k_norm.weight] * self.keys
            self.head_norm.weight = torch.stack(rows)
        self.out = _Product(attention.o_proj)
        self.mlp_norm = _Norm(layer.post_attention_layernorm)
        self.gate_up = _Product(mlp.gate_proj, mlp.up_proj)
        self.activation = mlp.act_fn
        self.down = _Product(mlp.down_proj)

    def forward(self, hidden: torch.Tensor, rotary: _Rotary, step: Step) -> torch.Tensor:
        """``hidden`` [T, H], changed in place."""
        heads = self.qkv(self.input_norm(hidden)).view(len(hidden), -1, self.width)
        rotated, value = heads[:, : -self.keys], heads[:, -self.keys :]
        if self.head_norm is not None:
            rotated = self.head_norm(rotated)
        rotated = rotary(rotated)
        query, key = rotated[:, : self.queries], rotated[:, self.queries :]
        packed = [x.transpose(0, 1)[None] for x in (query, key, value)]
        attended = step.attend(self.index, packed[0], packed[1], packed[2], self.scale)
        hidden = self.out.add_to(hidden, attended.reshape(len(hidden), -1))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return self.down.add_to(hidden, self.activation(gate).mul_(up))


class FusedModel:
    """See :func:`fuse`. It does not see later changes of the weights it was made from."""

    def __init__(self, twin: Any) -> None:
        model = twin.model
        self._embedding: torch.Tensor = model.embed_tokens.weight
        self._rotary = model.rotary_emb
        self._layers = [_Layer(layer) for layer in model.layers]
        self._norm = _Norm(model.norm)
        self._head = _Product(twin.lm_head)
        self.vocabulary = len(self._embedding)

    def forward(self, step: Step) -> torch.Tensor:
        """Logits [n, V] after each of the step's ``last`` tokens."""
        hidden = F.embedding(step.input_ids[0], self._embedding)
        cos, sin = self._rotary(hidden, step.position_ids)
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        rotary = _Rotary(cos[0, :, None], sin[0, :, None])
        for layer in self._layers:
            hidden = layer.forward(hidden, rotary, step)
        return self._head(self._norm(hidden[step.last]))
