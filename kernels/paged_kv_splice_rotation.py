"""Rotary position embedding as rotations by a difference of positions.

A stored key at position ``p`` is the raw key, each of its pairs turned by ``p`` times the pair's
frequency; turning it on by ``shift`` times the frequency makes it the key of ``p + shift``. That
holds wherever a frequency is a constant of the model: plain, linear, Llama-3 and YaRN scaling,
which only choose other constants. A constant factor of cosine and sine (YaRN's) is in the stored
key already; turning by the engine's own table of cosines would multiply it in again.

Sources: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071; linear scaling, arXiv 2306.15595;
Llama-3's, and what the names of a config mean: transformers' ``modeling_rope_utils``.

Legend: R rotated width of a head, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NO_ROPE", "Rope"]

NO_ROPE = -1
"""In ``Rope.layers``: this layer's keys carry no position."""

_SUPPORTED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """How a model's keys carry their positions.

    Args:
        frequencies: tables of R/2 radians per position each; more than one where layers differ.
        layers: which table each of the L layers has, or ``NO_ROPE``; empty: the first, in all.
        interleaved: pairs are neighbours (2i, 2i + 1), as in GPT-J; otherwise (i, i + R/2), as in
            NeoX, Llama and Qwen. Either way of the first R numbers of a head.

    Raises:
        ValueError: tables differ in length, or a layer names one that is not there.
    """

    frequencies: tuple[tuple[float, ...], ...]
    layers: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        lengths = sorted({len(table) for table in self.frequencies})
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError(
                f"frequencies have tables of lengths {lengths}, expected one length R/2 >= 1"
            )
        if not np.isfinite(self.frequencies).all():
            raise ValueError("frequencies are not all finite, expected radians per position")
        for layer, table in enumerate(self.layers):
            if not NO_ROPE <= table < len(self.frequencies):
                raise ValueError(
                    f"layer {layer} has table {table}, expected below {len(self.frequencies)}, or "
                    f"{NO_ROPE} for none"
                )

    @property
    def width(self) -> int:
        """R: how many numbers of a head are turned."""
        return 2 * len(self.frequencies[0])

    def rotations(self, shift: int) -> npt.NDArray[np.float32]:
        """[tables, R/2, 2]: cosine and sine of ``shift`` positions; in float64, then rounded."""
        angles = np.array(self.frequencies, np.float64) * float(shift)
        return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)

    @classmethod
    def from_config(cls, config: Any, *, interleaved: bool) -> Rope:
        """That of a transformers config: ``rope_parameters``, or ``rope_scaling`` of older ones.

        ``interleaved`` is not in a config but in the model's code: ``False`` for Llama, Qwen and
        Mistral, ``True`` for GPT-J, Cohere and GLM-4.

        Raises:
            ValueError: a key cannot be turned on by a constant angle (dynamic NTK, long-rope,
                M-RoPE), or a moved token would see others than before (sliding windows).
        """
        _refuse_windows(config)
        given = _parameters(config)
        if given.keys() & {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"rope_parameters are by kind of layer, {sorted(given)}, expected one for all; "
                "give Rope the tables and layers yourself"
            )
        kind = given.get("rope_type", given.get("type", "default"))
        if given.get("mrope_section") is not None or kind == "mrope":
            raise ValueError(
                "rope_parameters have mrope_section (M-RoPE): a token has three positions there, "
                "expected one"
            )
        if kind not in _SUPPORTED:
            raise ValueError(
                f"rope_type is {kind!r}, expected one of {', '.join(_SUPPORTED)}: with others the "
                "frequencies depend on the length of the sequence"
            )
        head = getattr(config, "head_dim", None)
        head = head or config.hidden_size // config.num_attention_heads
        width = int(head * given.get("partial_rotary_factor", 1.0))
        frequencies = _plain(given["rope_theta"], width)
        if kind == "linear":
            frequencies = frequencies / given["factor"]
        elif kind == "llama3":
            frequencies = _llama3(frequencies, given)
        elif kind == "yarn":
            frequencies = _yarn(frequencies, given, config)
        # The model has them in float32: its keys were turned by these very numbers.
        table = tuple(frequencies.astype(np.float32).tolist())
        return cls((table,), _layers(config), interleaved)


def _refuse_windows(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    # Without a list of kinds a model has the window in all layers, unless it says that it is off.
    everywhere = not kinds and window and getattr(config, "use_sliding_window", True)
    if kinds - {"full_attention"} or everywhere:
        raise ValueError(
            f"layer_types are {sorted(kinds)} and sliding_window is {window}, expected full "
            "attention: a token that is moved would have seen others through its window"
        )


def _parameters(config: Any) -> dict[str, Any]:
    """Of the newer form, whichever the config has."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    found = found or getattr(config, "rope_scaling", None) or {}
    given = {name: value for name, value in found.items() if value is not None}
    for name in ("rope_theta", "partial_rotary_factor"):
        value = getattr(config, name, None)
        if value is not None:
            given.setdefault(name, value)
    if "rope_theta" not in given and not given.keys() & {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"rope_parameters are {given}, expected a rope_theta: the model has no rotary positions"
        )
    return given


def _layers(config: Any) -> tuple[int, ...]:
    # 1 where the layer has rotary positions, as in SmolLM3.
    marks = getattr(config, "no_rope_layers", None)
    return tuple(0 if mark else NO_ROPE for mark in marks) if marks else ()


def _plain(theta: float, width: int) -> npt.NDArray[np.float64]:
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    return np.asarray(float(theta) ** -exponents, np.float64)


def _llama3(
    frequencies: npt.NDArray[np.float64], given: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    # 0: slow pairs, whose wave is longer than the old context, are scaled; 1: fast ones stay.
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(frequencies * (kept + (1 - kept) / given["factor"]))


def _yarn(
    frequencies: npt.NDArray[np.float64], given: Mapping[str, Any], config: Any
) -> npt.NDArray[np.float64]:
    original = given.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = given.get("factor") or config.max_position_embeddings / original
    pairs, theta = len(frequencies), float(given["rope_theta"])
    # The pairs that turn this often within the old context.
    low, high = (
        pairs * math.log(original / (turns * 2 * math.pi)) / math.log(theta)
        for turns in (given.get("beta_fast") or 32, given.get("beta_slow") or 1)
    )
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high = high if high != low else low + 0.001
    scaled = np.clip((np.arange(pairs) - low) / (high - low), 0.0, 1.0)
    return np.asarray(frequencies * (scaled / factor + 1 - scaled))
