"""The losses of TRL, verl, Liger and THOR, as docs/losses.md says to write them.

The page's tables are the test's: each row is evaluated, and compared with what the peer's own code
gave for it (tests/golden/grpo).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from thor_fast.kernels import (
    KL,
    Counts,
    LossSpec,
    fused_linear_grpo,
    linear_grpo_reference,
    make_plan,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "grpo"
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
SETUP, *PER_BATCH = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \| (\w[^|]*) \|$", re.MULTILINE)

# Plans hold weights in float32: up to four roundings (a mean over tokens, one over sequences, the
# level's weight, the rollout's) of 2**-24 each. verl adds 1e-8 to lengths and 1e-10 to weights.
TOLERANCE = {torch.float64: 4 * 2**-24, torch.float32: 2e-5}
# What the page lists as different does differ by more than that.
VISIBLE = 1e-3

INPUTS = dict(np.load(GOLDEN / "inputs.npz"))
PEERS = ("trl", "verl", "liger")


def _rows(peer: str) -> dict[str, tuple[str, str, str]]:
    """Settings to plan, spec and how much is the same, of the peer's section."""
    title = {"trl": "TRL", "verl": "verl", "liger": "Liger"}[peer]
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = ROW.findall(section)
    assert len({settings for settings, *_ in found}) == len(found)
    return {settings: (plan, spec, same) for settings, plan, spec, same in found}


def _cases() -> list:
    return [
        pytest.param(peer, case, id=f"{peer}-{case['settings']}-{case['batch']}")
        for peer in PEERS
        for case in json.loads((GOLDEN / f"{peer}.json").read_text(encoding="utf-8"))["cases"]
    ]


@pytest.fixture(scope="module")
def names():
    """What the page's first example defines; it registers losses, so it runs once."""
    namespace: dict = {"torch": torch}
    exec(SETUP, namespace)
    return namespace


@pytest.fixture(scope="module")
def recorded():
    return {peer: dict(np.load(GOLDEN / f"{peer}.npz")) for peer in PEERS}


def _inputs(batch: str) -> dict[str, torch.Tensor]:
    chosen = dict(INPUTS)
    if batch == "gap":
        chosen["mask"] = INPUTS["mask_gap"]
    if batch == "far":
        chosen["old_logp"], chosen["ref_logp"] = INPUTS["old_logp_far"], INPUTS["ref_logp_far"]
    return {name: torch.tensor(values) for name, values in chosen.items()}


def _packed(inputs: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """These sequences' tokens [T] in a row, float64."""
    mask = inputs["mask"][rows]
    batch, length = mask.shape
    found = {
        name: inputs[name][rows].flatten().double()
        for name in ("old_logp", "ref_logp", "rollout_logp", "token_advantages")
    }
    found["mask"], found["targets"] = mask.flatten(), inputs["targets"][rows].flatten()
    found["advantages"] = inputs["advantages"][rows]
    found["cu_seqlens"] = torch.arange(batch + 1) * length
    scores = torch.log_softmax(inputs["hidden"][rows].double() @ inputs["weight"].double().t(), -1)
    found["logp"] = scores.flatten(0, 1).gather(1, found["targets"][:, None]).squeeze(1)
    return found


def _total(first: Counts, *others: Counts) -> Counts:
    for other in others:
        first = first + other
    return first


def _ours(row: tuple[str, str, str], case: dict, names: dict, dtype: torch.dtype, op):
    """Loss and gradients by hidden [B, L, H] and weight [V, H], added up over micro-batches."""
    inputs = _inputs(case["batch"])
    bounds = np.cumsum([0, *case["parts"]]).tolist()
    parts = [_packed(inputs, slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]
    basic = [
        {"mask": part["mask"], "advantages": part["advantages"], "cu_seqlens": part["cu_seqlens"]}
        for part in parts
    ]
    lengths = {"longest": 12, "width": 7, "step_sequences": float(bounds[-1])}
    step = _total(*(make_plan(level=0, **known).counts for known in basic))
    hidden = inputs["hidden"].to(dtype).flatten(0, 1).requires_grad_()
    weight = inputs["weight"].to(dtype).requires_grad_()
    bias = inputs["bias"].to(dtype) if "bias=True" in case["settings"] else None
    loss, at = torch.zeros((), dtype=dtype), 0
    for part, known in zip(parts, basic, strict=True):
        here = {**names, **lengths, **part, "step": step}
        exec("\n".join(PER_BATCH), here)
        plan = make_plan(level=0, **{**known, **eval(f"dict({row[0]})", here)})
        spec, stop = eval(row[1], here), at + len(part["mask"])
        tokens = (part["targets"], plan, part["old_logp"], part["ref_logp"])
        loss = loss + op(hidden[at:stop], weight, *tokens, spec=spec, bias=bias)
        at = stop
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def _fused(*args, **kwargs) -> torch.Tensor:
    # Chunks that end within sequences.
    return fused_linear_grpo(*args, **kwargs, chunk_rows=7, impl="reference").loss


def _distances(ours: dict, theirs: dict) -> dict[str, float]:
    """The largest difference, relative to the largest number."""
    found = {}
    for name, mine in ours.items():
        other = torch.tensor(theirs[name]).reshape(mine.shape).double()
        found[name] = float((mine.double() - other).abs().max() / other.abs().max())
    return found


@pytest.mark.parametrize("op", [_fused, linear_grpo_reference], ids=["fused", "reference"])
@pytest.mark.parametrize(("peer", "case"), _cases())
def test_a_row_of_the_page_gives_the_peers_loss(peer, case, op, names, recorded):
    row = _rows(peer)[case["settings"]]
    theirs = {name: recorded[peer][f"{case['key']}.{name}"] for name in ("loss", "hidden", "weight")}
    if op is linear_grpo_reference and any(name in row[1] for name in REGISTERED):
        pytest.skip("the plain twin has no registered losses")
    dtype = torch.tensor(theirs["loss"]).dtype
    distances = _distances(_ours(row, case, names, dtype, op), theirs)
    print(distances)
    if row[2] == "gradients":
        del distances["loss"]
    if row[2].startswith("no"):
        assert max(distances.values()) > VISIBLE
    else:
        assert max(distances.values()) <= TOLERANCE[dtype]


REGISTERED = ("policy_gradient", "reward_optimization")
