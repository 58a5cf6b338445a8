"""The inputs all peers and we compute the loss of: small, seeded, float32 values.

Legend: B sequences, L positions of each, V vocabulary, H hidden. The first PROMPT positions of a
sequence are its prompt. Row t is the state that predicts the token after it, so the rows of a
response are those of COLUMNS.
"""

from __future__ import annotations

import numpy as np

B, L, V, H, PROMPT = 5, 9, 23, 8, 2
COLUMNS = slice(PROMPT - 1, L - 1)
LONGEST = 12
"""The longest completion allowed: of no sequence here."""

ADVANTAGES = (1.3, -0.8, 0.0, 0.4, -1.1)
# Log-ratios by sequence: above the clip range, below it, three within.
SHIFTS = (0.4, -0.35, 0.1, 0.02, 0.1)


def make() -> dict[str, np.ndarray]:
    """[B, L] or [B] each, but for hidden [B, L, H], weight [V, H] and bias [V]."""
    rng = np.random.default_rng(4)
    hidden = rng.normal(size=(B, L, H))
    weight = rng.normal(size=(V, H)) * 0.7
    targets = rng.integers(0, V, size=(B, L))
    logp = _logp(hidden, weight, targets)
    log_ratio = np.array(SHIFTS)[:, None] + rng.normal(size=(B, L)) * 0.25
    # A ratio above dual clip's 3, and one below 1 that the clip holds, at negative advantages.
    log_ratio[4, 3], log_ratio[1, 4] = 1.4, -0.9
    from_reference = rng.normal(size=(B, L)) * 0.4
    far = log_ratio.copy()
    far[0, 2], far[1, 3], far[3, 3], far[4, 2] = 25.0, 25.0, -25.0, -25.0
    far_from_reference = from_reference.copy()
    far_from_reference[0, 3], far_from_reference[1, 2], far_from_reference[4, 5] = 25.0, -25.0, -3.0
    mask = np.zeros((B, L), dtype=bool)
    mask[:, COLUMNS] = True
    mask[0, 3:5] = mask[3, 5] = False  # what a tool said
    mask[1, 7:] = mask[4, 6:] = False  # padding
    gap = mask.copy()
    gap[3] = False
    found = {
        "hidden": hidden,
        "weight": weight,
        "bias": rng.normal(size=V) * 0.5,
        "old_logp": logp - log_ratio,
        "old_logp_far": logp - far,
        "ref_logp": logp - from_reference,
        "ref_logp_far": logp - far_from_reference,
        "rollout_logp": logp - log_ratio - rng.normal(size=(B, L)) * 0.6,
        "advantages": np.array(ADVANTAGES),
        "token_advantages": np.array(ADVANTAGES)[:, None] + rng.normal(size=(B, L)) * 0.5,
    }
    inputs = {name: values.astype(np.float32) for name, values in found.items()}
    return inputs | {"targets": targets, "mask": mask, "mask_gap": gap}


def choose(inputs: dict[str, np.ndarray], batch: str) -> dict[str, np.ndarray]:
    """``whole``; ``gap``: with a sequence that has no tokens; ``far``: beyond the clamps."""
    chosen = dict(inputs)
    if batch == "gap":
        chosen["mask"] = inputs["mask_gap"]
    if batch == "far":
        chosen["old_logp"], chosen["ref_logp"] = inputs["old_logp_far"], inputs["ref_logp_far"]
    return chosen


def _logp(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = hidden @ weight.T
    top = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_sum
