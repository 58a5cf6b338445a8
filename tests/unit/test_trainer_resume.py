"""Runs that were cut off go on exactly, and what is on the disk is whole.

"Exactly" is to the bit here: one machine, one thread, one episode at a time (``max_live``), so that
the engine's matrix products have the same shapes in both runs. With several episodes at a time the
clock decides which tokens share a forward, and log-probs differ in their last bits.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thor_fast.errors import ConfigError, DataError
from thor_fast.rl import checkpoints
from thor_fast.rl.checkpoints import Progress
from thor_fast.rollout.records import read_trajectories

from .training_run import make_trainer, tiny_model

SCRIPT = Path(__file__).parent / "training_run.py"
PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")


def in_a_process(*runs) -> int:
    """Its exit status."""
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), json.dumps(runs)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics that are no times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in lines]


def tokens(folder: Path) -> dict[str, list[list[int]]]:
    """Of all trajectories, by file."""
    return {
        path.name: [
            t.token_ids
            for batch in read_trajectories(path)
            for group in batch.groups
            for t in group.trajectories
        ]
        for path in (folder / "trajectories").iterdir()
    }


def test_a_killed_run_goes_on_exactly(tmp_path) -> None:
    """SIGKILL in the middle of the third step's rollouts, after a checkpoint of the second."""
    through, killed = tmp_path / "through", tmp_path / "killed"
    first = {"output_dir": str(killed), "die_after": 2 * 8 + 5}
    assert in_a_process(first) == -signal.SIGKILL
    assert [m["step"] for m in numbers(killed)] == [1, 2]
    again = {"output_dir": str(killed), "resume": True}
    assert in_a_process({"output_dir": str(through)}, again) == 0
    expected, found = numbers(through), numbers(killed)
    assert [m["step"] for m in found] == [1, 2, 3, 4]
    assert found == expected
    weights = [torch.load(folder / "weights.pt") for folder in (through, killed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert tokens(killed) == tokens(through)


@PEFT
@pytest.mark.parametrize(
    "over",
    [
        {"mini_batches": 2, "optimizer": {"lr": 1e-2, "warmup_steps": 6}},
        {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2}, "gradient_checkpointing": True},
        {"loss": {"kl_beta": 0.1}, "max_batches": 4},
    ],
    ids=["schedule", "adapter with dropout", "reference"],
)
def test_what_a_checkpoint_holds_is_all_there_is(tmp_path, over) -> None:
    histories = []
    for folder, parts in ((tmp_path / "a", [4]), (tmp_path / "b", [1, 3, 4])):
        history = []
        for steps in parts:
            torch.manual_seed(steps)  # whatever the process did before
            trainer = make_trainer(output_dir=folder, resume=True, **{**over, "steps": steps})
            history += trainer.train()
            asyncio.run(trainer.engine.aclose())
        histories.append([{k: v for k, v in m.items() if not k.endswith("_s")} for m in history])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 4


def test_the_model_of_a_checkpoint_can_be_loaded(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    trainer = make_trainer(model, output_dir=tmp_path)
    trainer.train()
    asyncio.run(trainer.engine.aclose())
    newest = checkpoints.newest(tmp_path / "checkpoints")
    loaded = AutoModelForCausalLM.from_pretrained(newest / "model")
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def run_once(folder: Path, **over) -> None:
    trainer = make_trainer(output_dir=folder, **over)
    asyncio.run(trainer.engine.aclose())


def test_other_settings_are_another_run(tmp_path) -> None:
    trainer = make_trainer(output_dir=tmp_path, steps=2)
    trainer.train()
    asyncio.run(trainer.engine.aclose())
    with pytest.raises(ConfigError, match=r"step-000002 is there, expected resume or an empty"):
        run_once(tmp_path)
    with pytest.raises(
        ConfigError, match=r"optimizer.lr is 0.5, expected 0.01 as in .*step-000002"
    ):
        run_once(tmp_path, resume=True, optimizer={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"branch.group_size is 8, expected None"):
        run_once(tmp_path, resume=True, branch={})
    progress = tmp_path / "checkpoints" / "step-000002" / "progress.json"
    record = json.loads(progress.read_text())
    progress.write_text(json.dumps({**record, "processes": 2}))
    with pytest.raises(ConfigError, match=r"1 processes, expected 2 as in"):
        run_once(tmp_path, resume=True)
    progress.write_text(json.dumps({**record, "schema_version": 9}))
    with pytest.raises(DataError, match=r"schema_version 9, expected 1"):
        run_once(tmp_path, resume=True)


def write(folder: Path, step: int, save_model=lambda path: path.mkdir(), keep: int = 2) -> Path:
    return checkpoints.write(
        folder,
        Progress(step, 0, 0, 0, 1, {}),
        config="",
        training={},
        save_model=save_model,
        keep=keep,
    )


def test_a_checkpoint_that_fails_leaves_the_last_one(tmp_path) -> None:
    def fail(path):
        path.mkdir()
        (path / "half").write_text("x")
        raise OSError(28, "No space left on device")

    first = write(tmp_path, 1)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2, fail)
    assert checkpoints.newest(tmp_path) == first
    assert checkpoints.read_progress(first).step == 1
    assert write(tmp_path, 2) == checkpoints.newest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_old_checkpoints_go(tmp_path) -> None:
    assert checkpoints.newest(tmp_path / "none") is None
    for step in (9, 10, 11, 1_000_000):
        write(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000011", "step-1000000"]
    assert checkpoints.newest(tmp_path).name == "step-1000000"


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    path = write(tmp_path, 3)
    (path / "progress.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read the checkpoint .*step-000003"):
        checkpoints.read_progress(path)
