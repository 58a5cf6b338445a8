"""Train the tiny policy: ``python -m thor_fast.synthetic.train --output DIR``.

Teaches by imitation: next-token loss on the model's own tokens of worked transcripts, prompt and
tool output masked. Everything that decides the weights is in the recipe.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from thor_fast.config import load_toml
from thor_fast.errors import ConfigError
from thor_fast.synthetic.data import Batch, batches, transcripts
from thor_fast.synthetic.policy import tiny_policy_path
from thor_fast.synthetic.recipe import Architecture, Optimisation, Recipe
from thor_fast.synthetic.tokenizer import build_tokenizer

__all__ = ["build_model", "loss_of", "main", "train"]

RECIPE_FILE = "recipe.toml"
# Enough for the counts of a few hundred merges to be stable; takes two seconds.
_TOKENIZER_TRANSCRIPTS = 7_000
_LOG_EVERY_STEPS = 100


def build_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A freshly initialised model in float32 that knows the tokenizer's special tokens."""
    a = architecture
    config = Qwen3Config(
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        intermediate_size=a.intermediate_size,
        max_position_embeddings=a.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(a.qk_gain)
            layer.self_attn.k_norm.weight.fill_(a.qk_gain)
    return model


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the batch's model tokens, a float32 scalar."""
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    # Logits only where a model token comes next: a good third of the rows are prompt or tool.
    rows = hidden[:, :-1][batch.mask[:, 1:]]
    logits = model.lm_head(rows).float()
    return F.cross_entropy(logits, batch.token_ids[:, 1:][batch.mask[:, 1:]])


def train(recipe: Recipe) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train from nothing on the CPU; prints a line of progress now and then."""
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    sample = itertools.islice(transcripts(recipe.seed, recipe.shares), _TOKENIZER_TRANSCRIPTS)
    texts = (t.prompt + "".join(turn.text for turn in t.turns) for t in sample)
    tokenizer = build_tokenizer(texts, recipe.architecture.vocab_size)
    model = build_model(recipe.architecture, tokenizer)
    o = recipe.optimisation
    optimizers = _optimizers(model, o)
    tokens, running = 0, 0.0
    source = batches(tokenizer, recipe.seed, recipe.shares, o.batch_tokens)
    for step, batch in enumerate(itertools.islice(source, o.steps), start=1):
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        scale = _schedule(step, o)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.token_ids.numel()
        running += loss.item()
        if step % _LOG_EVERY_STEPS == 0 or step == o.steps:
            seconds = f"{time.monotonic() - started:.0f} s, CPU {time.process_time():.0f} s"
            mean = running / (step % _LOG_EVERY_STEPS or _LOG_EVERY_STEPS)
            print(
                f"step {step}/{o.steps}  loss {mean:.4f}  {tokens} tokens  {seconds}",
                flush=True,
            )
            running = 0.0
    return model, tokenizer


def _optimizers(model: Qwen3ForCausalLM, o: Optimisation) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "layers" not in n]
    muon = torch.optim.Muon(
        matrices, lr=o.matrix_lr, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=o.other_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer, peak in ((muon, o.matrix_lr), (adamw, o.other_lr)):
        for group in optimizer.param_groups:
            group["peak_lr"] = peak
    return [muon, adamw]


def _schedule(step: int, o: Optimisation) -> float:
    """Share of the peak learning rate at a step, counted from 1."""
    decay_start = o.decay_from * o.steps
    decay = (o.steps - step + 1) / (o.steps - decay_start + 1)
    return min(1.0, step / o.warmup_steps, decay)


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Path, output: Path
) -> None:
    """Write weights (float16), tokenizer and recipe to ``output``, which is made if missing."""
    output.mkdir(parents=True, exist_ok=True)
    # Halves on disk, but loaded with dtype="auto" it computes in float32: CPUs are slow at halves.
    # Copies are no longer seen to be tied, so the output head is left out by name.
    state = {n: t.half() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    if recipe.resolve() != (output / RECIPE_FILE).resolve():
        shutil.copyfile(recipe, output / RECIPE_FILE)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained policy")
    parser.add_argument("--recipe", type=Path, default=tiny_policy_path() / RECIPE_FILE)
    args = parser.parse_args(argv)
    try:
        recipe = load_toml(args.recipe, Recipe)
    except ConfigError as error:
        parser.error(str(error))
    started = time.monotonic()
    model, tokenizer = train(recipe)
    save(model, tokenizer, args.recipe, args.output)
    parameters = sum(p.numel() for p in model.parameters())
    wall, cpu = time.monotonic() - started, time.process_time()
    # On a busy machine the CPU time says more about the cost than the wall clock.
    print(f"{parameters} parameters in {args.output}, {wall:.0f} s, CPU {cpu:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
