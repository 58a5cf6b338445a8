"""The trainer on a random model: what a step does, in which order, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
import torch

from thor_fast.config import dump_toml, load_toml
from thor_fast.errors import ConfigError, SandboxError, TrainingError
from thor_fast.rl import checkpoints
from thor_fast.rl.settings import TrainerConfig
from thor_fast.rollout.records import read_trajectories

from .training_run import even_tokens, make_trainer, tiny_model

FEW = pytest.mark.filterwarnings("ignore:step .* to learn from:RuntimeWarning")


@pytest.fixture
def trainer():
    """``make_trainer``, whose engines are stopped in the end."""
    made = []

    def make(*args, **over):
        made.append(make_trainer(*args, **over))
        return made[-1]

    yield make
    for each in made:
        asyncio.run(each.engine.aclose())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def distance(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@FEW
def test_a_run_improves_its_reward(trainer) -> None:
    history = trainer(steps=12, train_prompts=4, optimizer={"lr": 2e-2}).train()
    rewards = [metrics["reward"] for metrics in history]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.15


def test_the_engine_has_the_new_weights(trainer) -> None:
    """Ratios are 1 in every step: what was sampled came from the weights that are trained."""
    made = trainer()
    history = made.train()
    assert made.engine.weight_version == made.state.weight_version == 4
    for metrics in history:
        assert metrics["episode/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["episode/approx_kl"] < 1e-8


@pytest.mark.parametrize("tokens", [12, 40])
def test_micro_batches_add_up_to_the_batch(trainer, tokens) -> None:
    """Adam's first step has the gradient's sign alone, so this is about gradients: SGD-like."""
    results = []
    for budget in (4096, tokens):
        model = tiny_model()
        history = trainer(
            model, steps=1, micro_batch_tokens=budget, optimizer={"lr": 1e-2, "eps": 1.0}
        ).train()
        results.append((weights(model), history[0]))
    assert distance(results[0][0], results[1][0]) < 1e-7
    for name in ("loss", "grad_norm", "episode/ratio"):
        assert results[0][1][name] == pytest.approx(results[1][1][name], rel=1e-5)


def test_several_updates_of_one_rollout(trainer) -> None:
    """The second is off-policy: its ratios are not 1 any more."""
    (metrics,) = trainer(steps=1, train_prompts=4, mini_batches=2).train()
    assert metrics["updates"] == 2
    assert abs(metrics["episode/ratio"] - 1) > 1e-3
    (metrics,) = trainer(steps=1, train_prompts=4, mini_batches=9).train()
    assert metrics["updates"] == 4  # no more than groups


def test_thors_denominators(trainer) -> None:
    """With one level and one micro-batch they are the global ones."""
    results = [
        trainer(steps=1, micro_batch_tokens=4096, loss={"normalizer": name}).train()[0]
        for name in ("global", "thor")
    ]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    assert results[1]["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_old_logprobs_of_the_trainers_own(trainer, cap) -> None:
    """An engine that samples from something else: ratios against the trainer's own start at 1."""
    made = trainer(
        engine_model=tiny_model(),
        steps=1,
        micro_batch_tokens=4096,
        recompute_old_logprobs=True,
        rollout_weight_cap=cap,
        optimizer={"lr": 1e-2, "eps": 1.0},
    )
    seen = []
    plan = made._learner._loss.plan
    made._learner._loss.plan = lambda batch: seen.append(batch) or plan(batch)
    with torch.no_grad():
        for parameter in made._learner.model.parameters():
            parameter += 0.01 * torch.ones_like(parameter).cumsum(-1).sin()
    made._engine_model = None  # the engine keeps the old weights
    (metrics,) = made.train()
    assert metrics["episode/ratio"] == pytest.approx(1.0, abs=1e-6)
    last = seen[-1]
    if cap is None:
        assert last.rollout_weight is None
    else:
        first = seen[0]
        expected = (last.old_logprobs - first.old_logprobs).exp().clamp(max=cap)
        assert torch.allclose(last.rollout_weight[last.loss_mask], expected[last.loss_mask])
        assert (last.rollout_weight[last.loss_mask] - 1).abs().max() > 1e-3


def test_a_penalty_for_leaving_the_first_weights(trainer) -> None:
    history = trainer(steps=2, loss={"kl_beta": 0.5}).train()
    assert history[0]["episode/kl"] == pytest.approx(0.0, abs=1e-6)
    assert history[1]["episode/kl"] > 1e-4
    assert history[1]["episode/kl_loss"] == pytest.approx(0.5 * history[1]["episode/kl"], rel=1e-4)


def test_bfloat16_and_gradient_checkpointing_are_near(trainer) -> None:
    results = {}
    for name, over in {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "bf16": {"mixed_precision": "bf16"},
    }.items():
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        model = tiny_model()
        (metrics,) = trainer(model, steps=1, optimizer={"lr": 1e-2, "eps": 1.0}, **over).train()
        assert next(model.parameters()).dtype is torch.float32
        results[name] = (weights(model), metrics)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert distance(results["plain"][0], results["checkpointed"][0]) < 1e-7
    # A step moves weights by up to 1e-2 times a gradient of about 1; bfloat16 has three digits.
    assert 0 < distance(results["plain"][0], results["bf16"][0]) < 5e-4
    plain, half = results["plain"][1], results["bf16"][1]
    assert half["grad_norm"] == pytest.approx(plain["grad_norm"], rel=5e-2)


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_the_engine_samples_from_the_adapter(trainer) -> None:
    model = tiny_model()
    before = weights(model)
    made = trainer(model, steps=3, lora={"rank": 4, "alpha": 8}, recompute_old_logprobs=True)
    seen = []
    made._learner._prepared = _spied(made._learner._prepared, seen)
    made.train()
    after = model.state_dict()
    # The model itself stays; peft has put its weights under other names.
    assert all(
        torch.equal(v, after[n.replace("_proj.", "_proj.base_layer.")]) for n, v in before.items()
    )
    assert any(value.any() for name, value in after.items() if "lora_B" in name)
    for engine, own in seen:
        mask = engine.loss_mask
        gap = (engine.old_logprobs - own.old_logprobs)[mask].abs().max()
        assert gap < 1e-5  # float32, another order of summation
    assert len(seen) >= 3


def _spied(prepared, seen):
    def call(batch):
        own = prepared(batch)
        seen.append((batch, own))
        return own

    return call


def test_uninformative_groups_are_not_trained_on(trainer) -> None:
    """A reward that never differs: batches up to the cap, a skip that counts, one warning."""
    model = tiny_model()
    before = weights(model)
    made = trainer(model, steps=2, max_batches=3, reward=lambda *_: 1.0)
    with pytest.warns(RuntimeWarning, match="step 1: 3 batches of 2 prompts gave 0 groups") as all_:
        history = made.train()
    assert len([w for w in all_ if "to learn from" in str(w.message)]) == 1
    assert [m["skipped_steps"] for m in history] == [1.0, 2.0]
    assert all(m["batches"] == 3 and m["updates"] == 0 for m in history)
    assert made.state.position == 12
    assert distance(before, weights(model)) == 0
    assert made.engine.weight_version == 0


def test_rollouts_go_on_until_groups_differ(trainer) -> None:
    """Half of the tasks teach nothing; of more groups than needed the first are kept."""

    def reward(trajectory, reference):
        return even_tokens(trajectory, reference) if int(reference) % 2 else 0.0

    made = trainer(steps=3, max_batches=20, prompts=8, train_prompts=4, reward=reward)
    history = made.train()
    for metrics in history:
        assert metrics["groups"] == 4
        assert metrics["batches"] >= 2
    again = trainer(steps=3, max_batches=20, prompts=8, train_prompts=4, reward=reward)
    assert [m["loss"] for m in again.train()] == [m["loss"] for m in history]


def test_a_loss_that_is_not_finite_changes_nothing(trainer, tmp_path) -> None:
    model = tiny_model()
    made = trainer(model, output_dir=tmp_path, checkpoint_every=1)
    update = made._learner.update

    def spoiled(sequences):
        if made.state.step == 2:
            made._learner._loss.forward = _nan_of(made._learner._loss.forward)
        return update(sequences)

    made._learner.update = spoiled
    with pytest.raises(
        TrainingError, match=r"step 3: loss is nan.*last checkpoint is .*step-000002"
    ):
        made.train()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(p.grad is None for p in model.parameters())
    assert checkpoints.newest(tmp_path / "checkpoints").name == "step-000002"


def _nan_of(forward):
    def call(*args):
        out = forward(*args)
        metrics = out.metrics
        metrics._sums = metrics._sums * math.nan
        return out._replace(loss=out.loss * math.nan, metrics=metrics)

    return call


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
    ],
)
def test_out_of_memory_says_what_to_try(trainer, error) -> None:
    made = trainer()

    def raise_(*_):
        raise error

    made._learner._loss.forward = raise_
    with pytest.raises(TrainingError, match=r"try fewer micro_batch_tokens than 64; there is no"):
        made.train()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_an_adapter_on_the_head_is_refused(trainer) -> None:
    model = tiny_model(tied=False)
    with pytest.raises(ConfigError, match=r"head is peft.*Linear, expected torch.nn.Linear"):
        trainer(model, lora={"target_modules": "lm_head"})


def test_a_bug_comes_out_as_it_is(trainer) -> None:
    made = trainer()
    made._learner.update = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        made.train()


def test_several_episodes_that_fail_alike_are_one_error(trainer) -> None:
    made = trainer()

    async def fail(*_):
        raise ExceptionGroup("episodes", errors)

    made._collector.scheduler.run = fail
    errors = [SandboxError("the sandbox is closed"), SandboxError("the sandbox is closed")]
    with pytest.raises(TrainingError, match=r"step 1: the sandbox is closed; there is no"):
        made.train()
    errors = [SandboxError("the sandbox is closed"), KeyError("a bug")]
    with pytest.raises(ExceptionGroup, match="episodes"):
        made.train()


def test_a_dead_engine_is_an_error(trainer) -> None:
    made = trainer()
    asyncio.run(made.engine.aclose())
    with pytest.raises(TrainingError, match=r"step 1: none of 8 trajectories was scored.*closed"):
        made.train()


def test_nothing_scored_is_an_error(trainer) -> None:
    with pytest.raises(TrainingError, match=r"none of 8 trajectories was scored; the first ended"):
        trainer(reward=lambda *_: None).train()


def test_unscored_trajectories_are_left_out(trainer) -> None:
    def reward(trajectory, reference):
        return None if trajectory.seed % 3 == 0 else even_tokens(trajectory, reference)

    history = trainer(reward=reward).train()
    assert sum(m["unscored"] for m in history) > 0
    assert all(m["updates"] == 1 for m in history)


def test_what_is_written(trainer, tmp_path) -> None:
    history = trainer(output_dir=tmp_path, trackers="tensorboard").train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [m["loss"] for m in history]
    for step in (1, 4):
        (batch,) = read_trajectories(tmp_path / "trajectories" / f"step-{step:06d}.jsonl")
        assert batch.context == {"step": step}
        assert [len(group.trajectories) for group in batch.groups] == [4, 4]
        assert batch.groups[0].trajectories[0].weight_version == step - 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "thor_fast"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("reward")]
    assert found == [(i + 1, pytest.approx(m["reward"])) for i, m in enumerate(history)]


def test_configuration_is_a_file(tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "steps = 3\n[optimizer]\nlr = 1e-4\n[branch]\nwhich = 'first'\n[lora]\nrank = 8\n"
        "[loss]\nagg = 'dr_grpo'\nnorm_tokens = 100\n"
    )
    config = load_toml(path, TrainerConfig)
    assert (config.optimizer.lr, config.branch.which, config.lora.rank) == (1e-4, "first", 8)
    path.write_text(dump_toml(config))
    assert load_toml(path, TrainerConfig) == config
    default = TrainerConfig()
    assert (default.optimizer.lr, default.group_size, default.temperature) == (1e-6, 16, 1.0)
    assert (default.loss.clip_low, default.loss.clip_high, default.loss.dual_clip) == (0.2, 0.28, 3)
    assert (default.loss.nll_alpha, default.loss.kl_beta) == (0.01, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 0", "steps is 0, expected >= 1"),
        ("temperature = 0", "temperature is 0.0, expected > 0"),
        ("rollout_weight_cap = 2.0", "expected recompute_old_logprobs too"),
        ("mixed_precision = 'fp8'", "mixed_precision is 'fp8' .* expected 'no' or 'bf16'"),
        ("[optimizer]\nlr = -1", r"\[optimizer\] lr is -1.0, expected > 0"),
        ("[optimizer]\nbeta2 = 1", r"beta2 is 1.0, expected 0 to below 1"),
        ("[loss]\nclip_low = 0", "clip_low is 0.0, expected > 0"),
        ("[loss]\nagg = 'mean'", "loss.agg is 'mean' .*, expected 'token-mean' or"),
        ("[loss]\nagg = 'dr_grpo'", "norm_tokens"),
        ("[lora]\nrank = 0", "rank is 0, expected >= 1"),
        ("[lora]\nranks = 1", "unknown key 'ranks', expected one of: rank"),
    ],
)
def test_settings_that_cannot_be(tmp_path, text, message) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_toml(path, TrainerConfig)


def test_a_terminal_gets_a_bar(trainer, monkeypatch, capsys) -> None:
    trainer(steps=2).train()
    plain = capsys.readouterr().err
    assert [line.split()[:2] for line in plain.splitlines()] == [["step", "1/2"], ["step", "2/2"]]
    monkeypatch.setenv("FORCE_COLOR", "1")
    trainer(steps=2).train()
    bar = capsys.readouterr().err
    assert "100%" in bar
    assert "step 1/2" not in bar


def test_unknown_trackers(trainer, tmp_path) -> None:
    with pytest.raises(ConfigError, match="trackers is 'tensorboard', expected an output_dir"):
        trainer(trackers="tensorboard")
    with pytest.raises(ConfigError, match="nonsense"):
        trainer(trackers="nonsense", output_dir=tmp_path)
