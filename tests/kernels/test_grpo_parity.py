"""The losses of TRL, verl, Liger and THOR, as docs/losses.md says to write them.

The page's tables are the test's: each row is evaluated, and compared with what the peer's own code
gave for it (tests/golden/grpo); THOR's formula is written down here.
"""

from __future__ import annotations

import json
import re
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch

from thor_fast.kernels import fused_linear_grpo, linear_grpo_reference, make_plan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "grpo"
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
SETUP, *PER_BATCH = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TITLES = {"trl": "TRL", "verl": "verl", "liger": "Liger"}

# Plans hold weights in float32: up to four roundings (a mean over tokens, one over sequences, the
# level's weight, the rollout's) of 2**-24 each. verl adds 1e-8 to lengths and 1e-10 to weights.
# Where the peer's own head runs, all is float32, and a gradient the sum of some hundred products.
TOLERANCE = {torch.float64: 4 * 2**-24, torch.float32: 100 * 2**-24}
# What the page lists as different does differ by more.
VISIBLE = 1e-3

INPUTS = dict(np.load(GOLDEN / "inputs.npz"))
PER_TOKEN = ("old_logp", "ref_logp", "rollout_logp", "token_advantages")
# Lengths the page speaks of: the longest completion allowed, that of the padded responses.
LENGTHS = {"longest": 12, "width": 7, "step_sequences": 5}


def _rows(title: str) -> dict[str, list[str]]:
    """Of the section with this title: settings to plan, spec and how much is the same."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = [
        [cell.strip("` ") for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    rows = {settings: rest for settings, *rest in found}
    assert len(rows) == len(found)
    return rows


ROWS = {peer: _rows(title) for peer, title in TITLES.items()}
THOR = _rows("THOR")
REGISTERED = re.findall(r'^register_loss\("(\w+)"', SETUP, re.MULTILINE)


def _fused(*args, **kwargs) -> torch.Tensor:
    # Chunks that end within sequences.
    return fused_linear_grpo(*args, **kwargs, chunk_rows=7, impl="reference").loss


def _cases() -> list:
    found = []
    for peer, rows in ROWS.items():
        recorded = json.loads((GOLDEN / f"{peer}.json").read_text(encoding="utf-8"))
        for case in recorded["cases"]:
            name = f"{peer}-{case['settings']}-{case['batch']}"
            found.append(pytest.param(peer, case, _fused, id=f"{name}-fused"))
            # The plain twin has the built-in losses only.
            if not any(kind in rows[case["settings"]][1] for kind in REGISTERED):
                found.append(pytest.param(peer, case, linear_grpo_reference, id=f"{name}-twin"))
    return found


@pytest.fixture(scope="module")
def names():
    """What the page's first example defines; it registers losses, so it runs once."""
    namespace: dict = {"torch": torch}
    exec(SETUP, namespace)
    return namespace


@pytest.fixture(scope="module")
def recorded():
    return {peer: dict(np.load(GOLDEN / f"{peer}.npz")) for peer in TITLES}


def _inputs(batch: str) -> dict[str, torch.Tensor]:
    chosen = dict(INPUTS)
    if batch == "gap":
        chosen["mask"] = INPUTS["mask_gap"]
    if batch == "far":
        chosen["old_logp"], chosen["ref_logp"] = INPUTS["old_logp_far"], INPUTS["ref_logp_far"]
    return {name: torch.from_numpy(values) for name, values in chosen.items()}


def _packed(inputs: dict[str, torch.Tensor], parts: list[int]) -> list[dict[str, torch.Tensor]]:
    """The tokens [T] of each micro-batch in a row, numbers in float64."""
    hidden, weight = inputs["hidden"].double(), inputs["weight"].double()
    targets = inputs["targets"]
    scores = torch.log_softmax(hidden @ weight.t(), dim=-1)
    whole = {name: inputs[name].double() for name in PER_TOKEN} | {
        "mask": inputs["mask"],
        "targets": targets,
        "logp": scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
    }
    split = {name: values.split(parts) for name, values in whole.items()}
    length = targets.shape[1]
    return [
        {name: values[i].flatten() for name, values in split.items()}
        | {
            "advantages": inputs["advantages"].split(parts)[i],
            "cu_seqlens": torch.arange(sequences + 1) * length,
        }
        for i, sequences in enumerate(parts)
    ]


def _known(part: dict[str, torch.Tensor]) -> dict:
    return {"level": 0} | {name: part[name] for name in ("mask", "advantages", "cu_seqlens")}


def _ours(row: list[str], case: dict, names: dict, dtype: torch.dtype, op) -> dict:
    """Loss and gradients by hidden states and head, added up over micro-batches."""
    inputs = _inputs(case["batch"])
    parts = _packed(inputs, case["parts"])
    step = reduce(add, (make_plan(**_known(part)).counts for part in parts))
    hidden = inputs["hidden"].to(dtype).flatten(0, 1).requires_grad_()
    weight = inputs["weight"].to(dtype).requires_grad_()
    bias = inputs["bias"].to(dtype) if "bias=True" in case["settings"] else None
    states = hidden.split([len(part["mask"]) for part in parts])
    losses = []
    for part, mine in zip(parts, states, strict=True):
        here = names | LENGTHS | part | {"step": step}
        exec("".join(PER_BATCH), here)
        plan = make_plan(**_known(part) | eval(f"dict({row[0]})", here))
        tokens = (part["targets"], plan, part["old_logp"], part["ref_logp"])
        losses.append(op(mine, weight, *tokens, spec=eval(row[1], here), bias=bias))
    loss = torch.stack(losses).sum()
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def _distances(ours: dict, theirs: dict) -> dict[str, float]:
    """The largest difference, relative to the largest number."""
    found = {}
    for name, mine in ours.items():
        other = torch.as_tensor(theirs[name]).reshape(mine.shape).double()
        scale = float(other.abs().max())
        if name == "loss":
            # A mean of terms of both signs: its rounding is relative to their size, not to its own.
            scale = max(scale, float(np.abs(INPUTS["advantages"]).mean()))
        found[name] = float((mine.double() - other).abs().max()) / scale
    return found


@pytest.mark.parametrize(("peer", "case", "op"), _cases())
def test_a_row_of_the_page_gives_the_peers_loss(peer, case, op, names, recorded):
    row = ROWS[peer][case["settings"]]
    files = recorded[peer]
    theirs = {name: files[f"{case['key']}.{name}"] for name in ("loss", "hidden", "weight")}
    dtype = torch.as_tensor(theirs["hidden"]).dtype
    distances = _distances(_ours(row, case, names, dtype, op), theirs)
    if row[2].startswith("no: "):
        assert max(distances.values()) > VISIBLE
        return
    if row[2] == "gradients":
        del distances["loss"]
    assert max(distances.values()) <= TOLERANCE[dtype], distances


@pytest.mark.parametrize("peer", TITLES)
def test_page_recordings_and_pins_are_of_the_same_settings_and_versions(peer):
    recorded = json.loads((GOLDEN / f"{peer}.json").read_text(encoding="utf-8"))
    assert {case["settings"] for case in recorded["cases"]} == set(ROWS[peer])
    assert f"{TITLES[peer]} {recorded['version']}" in PAGE
    pinned = (GOLDEN / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"{recorded['peer']}=={recorded['version']}" in pinned


@pytest.mark.parametrize("batch", ["whole", "gap", "far"])
def test_the_batches_reach_every_bound(batch):
    inputs = _inputs(batch)
    (part,) = _packed(inputs, [5])
    hidden, weight = inputs["hidden"].double().flatten(0, 1), inputs["weight"].double()
    plan = make_plan(**_known(part))
    out = fused_linear_grpo(hidden, weight, part["targets"], plan, part["old_logp"])
    found = out.metrics.wait()
    for bound in ("clipped_low", "clipped_high", "dual_clipped"):
        assert 0 < found[f"episode/{bound}"] < 0.5


def _thor(hidden: torch.Tensor, weight: torch.Tensor, part: dict, settings: dict) -> torch.Tensor:
    """The loss of one micro-batch, before its share (THOR, dp_actor.py:286-328)."""
    scores = torch.log_softmax(hidden @ weight.t(), dim=1)
    logp = scores.gather(1, part["targets"].unsqueeze(1)).squeeze(1)
    entropy = -(scores.exp() * scores).sum(dim=1)
    mask, adv = part["mask"], part["advantages"].repeat_interleave(part["cu_seqlens"].diff())
    ratio = (logp - part["old_logp"]).exp()
    worst = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - 0.2, 1 + 0.28))
    policy = torch.where(adv < 0, torch.minimum(worst, -adv * 3.0), worst)
    x = part["ref_logp"] - logp
    k3 = (x.exp() - x - 1).clamp(-10, 10)
    positive = mask & (adv > 1e-7)
    nll = -(positive * logp).sum() / positive.sum().clamp(min=1)
    return (
        (policy * mask).sum() / mask.sum()
        - settings.get("entropy_coeff", 0.0) * (entropy * mask).sum() / mask.sum()
        + settings.get("kl_loss_coef", 0.0) * (k3 * mask).sum() / mask.sum()
        + settings["alpha"] * nll
    )


def _gradients(losses: list[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor) -> dict:
    loss = torch.stack(losses).sum()
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    return {"loss": loss.detach(), "hidden": by_hidden, "weight": by_weight}


@pytest.mark.parametrize("parts", [[5], [2, 3]], ids=["one", "two micro-batches"])
@pytest.mark.parametrize("batch", ["whole", "gap", "far"])
@pytest.mark.parametrize("settings", THOR)
def test_a_row_of_the_page_gives_the_loss_of_thors_formula(settings, batch, parts, names):
    inputs = _inputs(batch)
    hidden = inputs["hidden"].double().flatten(0, 1).requires_grad_()
    weight = inputs["weight"].double().requires_grad_()
    packed = _packed(inputs, parts)
    states = hidden.split([len(part["mask"]) for part in packed])
    levels = torch.tensor([0, 1, 0, 1, 0]).split(parts)
    theirs, ours = [], []
    for part, mine, level in zip(packed, states, levels, strict=True):
        share = len(level) / sum(parts)
        theirs.append(_thor(mine, weight, part, eval(f"dict({settings})")) * share)
        here = names | LENGTHS | part
        plan_of, spec_of = (eval(f"dict({THOR[settings][0]})", here), eval(THOR[settings][1], here))
        plan = make_plan(**_known(part) | plan_of | {"level": level})
        tokens = (part["targets"], plan, part["old_logp"], part["ref_logp"])
        ours.append(_fused(mine, weight, *tokens, spec=spec_of))
    results = [_gradients(losses, hidden, weight) for losses in (ours, theirs)]
    assert max(_distances(*results).values()) <= TOLERANCE[torch.float64]
