"""What the loss is made of: the settings of one call, plain data.

Sources (arXiv): PPO's clip 1707.06347; dual clip 1912.09729; clip-higher and token-mean, DAPO
2503.14476; CISPO, MiniMax-M1 2506.13585; GSPO 2507.18071; geometric mean, GMPO 2507.20673; SAPO
2511.20347; NLL on positive tokens and the two levels, THOR 2509.13761; the k1, k2, k3 estimators,
J. Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Literal

__all__ = ["BUILT_IN_LOSSES", "KL", "LossSpec", "spec_of"]

BUILT_IN_LOSSES = ("ppo", "cispo", "gspo", "geo_mean", "sapo")
SEQUENCE_LOSSES = ("gspo", "geo_mean")
"""Those whose ratio is that of a whole sequence."""


@dataclass(frozen=True, slots=True)
class KL:
    """A penalty ``beta * KL(policy || reference)`` per token, estimated from the sampled token.

    With ``x = ref_logp - logp``: ``k1`` is ``-x``, ``k2`` is ``x**2 / 2``, ``k3`` is
    ``exp(x) - x - 1``. Beyond a clamp the gradient is zero.

    Args:
        kind: the estimator.
        beta: its weight, >= 0.
        clamp_input: bound of ``|x|``, > 0; ``inf`` for none (verl 0.9.1 has 20).
        clamp_output: bound of the estimate's magnitude, > 0; ``inf`` for none (verl and THOR: 10).

    Raises:
        ValueError: a setting is out of range; the message says which.
    """

    kind: Literal["k1", "k2", "k3"] = "k3"
    beta: float = 0.001
    clamp_input: float = 20.0
    clamp_output: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in ("k1", "k2", "k3"):
            raise ValueError(f"kind is {self.kind!r}, expected 'k1', 'k2' or 'k3'")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}, expected a finite number >= 0")
        _check_positive(clamp_input=self.clamp_input, clamp_output=self.clamp_output)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The token-wise loss and what is added to it.

    With the policy ratio ``r = exp(logp - old_logp)`` and the advantage ``A`` of a token, ``kind``
    is

    - ``ppo``: ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``; with ``dual_clip`` at most
      ``-A dual_clip`` where ``A < 0``; with ``delta`` the first ``r`` is at most ``delta``;
    - ``cispo``: ``-A min(r, 1 + clip_high) logp``, the factor without gradient;
    - ``gspo``: ``ppo`` with the sequence's ``r``, the exponential of the mean log-ratio of its
      tokens, and gradient to each token as if it were its own;
    - ``geo_mean``: the sequence's ``r`` from log-ratios clipped per token to
      ``[-clip_low, clip_high]`` on the side that the advantage rewards;
    - ``sapo``: ``-A 4 / t sigmoid(t (r - 1))``, ``t`` from ``sapo_temperatures`` by A's sign;
    - any name given to :func:`register_loss`.

    Args:
        kind: see above.
        clip_low, clip_high: > 0.
        dual_clip: > 1, or ``None`` for none (``ppo`` and ``gspo``).
        delta: > 1 + clip_high, or ``None`` for none (``ppo`` and ``gspo``; TRL's two-sided clip).
        log_ratio_clamp: bound of ``|logp - old_logp|``, > 0, beyond which the gradient is zero.
        sapo_temperatures: ``t`` where the advantage is positive, and where it is not; > 0.
        nll_alpha: weight of ``-logp`` on tokens of positive advantage, >= 0.
        kl: ``None`` for no penalty; otherwise ``ref_logp`` is needed.
        entropy_coef: weight of the entropy bonus, in nats; 0 also spares its computation.
        entropy: compute the entropy for the metrics although ``entropy_coef`` is 0.
        temperature: > 0, divides the logits. One per token is an argument of the ops.
        softcap: ``softcap * tanh(logits / softcap)`` before the temperature; > 0, or ``None``.
            A logit of -inf stays one.
        logit_scale: multiplies the logits before everything else; not 0.

    Raises:
        ValueError: a setting is out of range; the message says which.
    """

    kind: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    delta: float | None = None
    log_ratio_clamp: float = 20.0
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    nll_alpha: float = 0.01
    kl: KL | None = None
    entropy_coef: float = 0.0
    entropy: bool = False
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    # Here and not where it is used: torch.compile can read a string, but cannot trace json.
    text: str = field(init=False, repr=False, compare=False)
    """All of the above, as an argument of an operator of torch's, which takes no object of ours."""

    def __post_init__(self) -> None:
        _check_positive(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            log_ratio_clamp=self.log_ratio_clamp,
            sapo_temperatures=min(self.sapo_temperatures),
            temperature=self.temperature,
            softcap=1.0 if self.softcap is None else self.softcap,
        )
        if self.temperature == math.inf:
            raise ValueError("temperature is inf, expected a finite number")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}, expected > 1 or None")
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ValueError(
                f"delta is {self.delta}, expected > 1 + clip_high = {1 + self.clip_high} or None"
            )
        if not 0 <= self.nll_alpha < math.inf:
            raise ValueError(f"nll_alpha is {self.nll_alpha}, expected a finite number >= 0")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef is {self.entropy_coef}, expected a finite number")
        if not math.isfinite(self.logit_scale) or self.logit_scale == 0:
            raise ValueError(f"logit_scale is {self.logit_scale}, expected a finite number, not 0")
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        values["kl"] = None if self.kl is None else asdict(self.kl)
        object.__setattr__(self, "text", json.dumps(values))

    @property
    def by_sequence(self) -> bool:
        """Whether a token's loss depends on the log-probs of its sequence's other tokens."""
        return self.kind in SEQUENCE_LOSSES

    @property
    def needs_entropy(self) -> bool:
        """Whether rows' entropies are computed."""
        return self.entropy or self.entropy_coef != 0


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected > 0")


@lru_cache(maxsize=64)
def spec_of(text: str) -> LossSpec:
    """The settings whose ``text`` this is."""
    values = json.loads(text)
    values["kl"] = None if values["kl"] is None else KL(**values["kl"])
    values["sapo_temperatures"] = tuple(values["sapo_temperatures"])
    return LossSpec(**values)
