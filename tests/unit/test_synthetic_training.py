"""Training, saving and the command lines, on a recipe far smaller than the real one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from thor_fast.config import dump_toml, load_toml
from thor_fast.synthetic import TRAINED_FAMILIES, evaluate, load_policy, tiny_policy_path, train
from thor_fast.synthetic.evaluate import Measurement, table
from thor_fast.synthetic.recipe import Recipe

RECIPE = tiny_policy_path() / "recipe.toml"


@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory):
    recipe = load_toml(RECIPE, Recipe)
    recipe = dataclasses.replace(
        recipe,
        architecture=dataclasses.replace(
            recipe.architecture, hidden_size=32, layers=1, heads=1, kv_heads=1, intermediate_size=64
        ),
        optimisation=dataclasses.replace(
            recipe.optimisation, steps=20, batch_tokens=1024, warmup_steps=2
        ),
    )
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(dump_toml(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(small_recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("policy") / "new"
    assert train.main(["--recipe", str(small_recipe), "--output", str(output)]) == 0
    return output


def test_training_lowers_the_loss(trained, small_recipe):
    recipe = load_toml(small_recipe, Recipe)
    model, tokenizer = load_policy(trained)
    torch.manual_seed(recipe.seed)
    fresh = train.build_model(recipe.architecture, tokenizer)
    batch = next(train.batches(tokenizer, 99, recipe.shares, 2048))
    with torch.no_grad():
        assert train.loss_of(model, batch) < train.loss_of(fresh, batch) - 1


def test_loss_counts_only_model_tokens(trained):
    model, tokenizer = load_policy(trained)
    batch = next(train.batches(tokenizer, 99, load_toml(RECIPE, Recipe).shares, 512))
    with torch.no_grad():
        logits = model(input_ids=batch.token_ids).logits.double()
        losses = -logits.log_softmax(-1)[:, :-1].gather(2, batch.token_ids[:, 1:, None])[..., 0]
        expected = losses[batch.mask[:, 1:]].mean()
        torch.testing.assert_close(train.loss_of(model, batch).double(), expected)


def test_saved_in_halves_loaded_in_float32(trained, small_recipe):
    weights = load_file(trained / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights
    model, tokenizer = load_policy(trained)
    assert model.dtype is torch.float32
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor.float())
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert (trained / "recipe.toml").read_text() == small_recipe.read_text()


def test_wrong_command_lines_are_told(tmp_path, capsys):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text("sed = 1\n" + RECIPE.read_text("utf-8"), encoding="utf-8")
    with pytest.raises(SystemExit):
        train.main(["--recipe", str(recipe), "--output", str(tmp_path)])
    assert "unknown key 'sed', expected one of: seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--policy", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["--per-family", "0"])
    assert "--per-family is 0, expected at least 1" in capsys.readouterr().err


def test_table_shows_shares_and_recoveries():
    episodes, correct = dict.fromkeys(TRAINED_FAMILIES, 10), dict.fromkeys(TRAINED_FAMILIES, 8)
    text = table([Measurement("an arm", episodes, correct, 84, 70, 14, 7, 4_200)])
    assert "an arm              80.0%  of 70, 60 tokens each" in text
    assert "first call failed 14/70, answered correctly after that 7/14; 1.20 calls each" in text
