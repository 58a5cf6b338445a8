"""Many episodes: order, admission, no barrier, seeds, rewards, cancellation."""

from __future__ import annotations

import asyncio
import signal
import threading
from contextlib import aclosing
from dataclasses import replace

import pytest

from thor_fast.engines.base import SamplingParams
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.errors import ConfigError
from thor_fast.rollout import ObservationEncoder, Prompt, RolloutLimits, RolloutScheduler
from thor_fast.rollout.scheduler import trajectory_seed
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, Status, StopReason

EOS = 1
CALL = "```py\nx\n```"


class _Counting(ScriptedEngine):
    """Counts calls, and the most sequences that were live at once."""

    calls = 0
    peak = 0

    async def generate(self, request):
        self.calls += 1
        async for chunk in super().generate(request):
            self.peak = max(self.peak, self.kv_budget.live_sequences)
            yield chunk


@pytest.fixture
def scheduler(tokenizers, fake_sandbox):
    """``scheduler(engine, ...)`` and ``scheduler.script(text)``, one token per byte."""
    tokenizer = tokenizers.bytes

    def make(engine, sandbox=None, **options) -> RolloutScheduler:
        return RolloutScheduler(
            engine,
            sandbox or fake_sandbox(),
            PythonTool(tokenizer),
            encode=ObservationEncoder(tokenizer),
            limits=RolloutLimits(),
            sampling=options.pop("sampling", SamplingParams(seed=5)),
            eos_token_ids=frozenset({EOS}),
            **options,
        )

    make.script = lambda text: Script((*tokenizer.encode(text).ids, EOS))
    return make


def prompts(n: int) -> list[Prompt]:
    return [Prompt((100 + i,), reference=str(i), task_id=f"task{i}") for i in range(n)]


def no_tasks_left() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


async def test_groups_come_in_the_order_of_the_prompts(scheduler) -> None:
    # Longer scripts first, so that episodes end in another order than they start.
    engine = ScriptedEngine(
        {p.token_ids: [scheduler.script("x" * (9 - 3 * i))] for i, p in enumerate(prompts(3))}
    )
    groups = await scheduler(engine, group_size=2).run(prompts(3))
    assert [g.task_id for g in groups] == ["task0", "task1", "task2"]
    assert [g.prompt_ids for g in groups] == [(100,), (101,), (102,)]
    assert [[len(t.response_ids) for t in g.trajectories] for g in groups] == [
        [10, 10], [7, 7], [4, 4],
    ]  # fmt: skip
    assert {t.stop_reason for g in groups for t in g.trajectories} == {StopReason.EOS}
    assert no_tasks_left()


async def test_nothing_to_do(scheduler) -> None:
    assert await scheduler(ScriptedEngine({})).run([]) == []


@pytest.mark.parametrize(("max_live", "peak"), [(None, 4), (2, 2), (1, 1)])
async def test_admission_follows_the_kv_budget(scheduler, max_live, peak) -> None:
    # Beyond its budget this engine raises, which would show as ENGINE_FAILURE.
    engine = _Counting(
        {p.token_ids: [scheduler.script("xyz")] for p in prompts(5)}, max_sequences=4
    )
    groups = await scheduler(engine, group_size=3, max_live=max_live).run(prompts(5))
    assert {t.stop_reason for g in groups for t in g.trajectories} == {StopReason.EOS}
    assert engine.peak == peak


async def test_no_barrier(scheduler, fake_sandbox) -> None:
    """A slow snippet holds up its own episode and no other."""

    others_ended = asyncio.Event()

    class Uneven(fake_sandbox):
        async def submit(self, request):
            if request.code == "slow\n":
                async with asyncio.timeout(60):
                    await others_ended.wait()
            return await super().submit(request)

    slow, fast = scheduler.script("```py\nslow\n```"), scheduler.script(CALL * 3)
    engine = ScriptedEngine({(100,): [slow], (101,): [fast], (102,): [fast]}, max_sequences=2)
    ended = []
    async with aclosing(scheduler(engine, Uneven()).as_completed(prompts(3))) as episodes:
        async for episode in episodes:
            ended.append(episode.prompt)
            if len(ended) == 2:
                others_ended.set()
    assert ended == [1, 2, 0]


async def test_rollouts_go_on_while_the_caller_looks_at_one(scheduler, until) -> None:
    engine = ScriptedEngine(
        {p.token_ids: [scheduler.script("x")] for p in prompts(4)}, max_sequences=1
    )
    maker = scheduler(engine)
    async with aclosing(maker.as_completed(prompts(4))) as episodes:
        await anext(episodes)
        await until(lambda: len(maker.finished) == 4)


async def test_leaving_early_cancels_the_rest(scheduler, fake_sandbox) -> None:
    sandbox = fake_sandbox(delay_s=60)
    engine = ScriptedEngine(
        {(100,): [scheduler.script("x")], (101,): [scheduler.script(CALL)]}, max_sequences=2
    )
    async with aclosing(scheduler(engine, sandbox).as_completed(prompts(2))) as episodes:
        assert (await anext(episodes)).prompt == 0
    assert no_tasks_left()
    assert engine.kv_budget.live_sequences == 0


async def test_cancelling_keeps_what_had_finished(scheduler, fake_sandbox, until) -> None:
    sandbox = fake_sandbox(delay_s=60)
    scripts = {(100 + i,): [scheduler.script(CALL if i % 2 else "x")] for i in range(8)}
    engine = ScriptedEngine(scripts, max_sequences=8)
    maker = scheduler(engine, sandbox)
    task = asyncio.create_task(maker.run(prompts(8)))
    await until(lambda: sandbox.running == 4)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(e.prompt for e in maker.finished) == [0, 2, 4, 6]
    assert (sandbox.cancelled, sandbox.running) == (4, 0)
    assert engine.kv_budget.live_sequences == 0
    assert no_tasks_left()


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_shuts_down_cleanly(scheduler, fake_sandbox, until) -> None:
    sandbox = fake_sandbox(delay_s=600)
    engine = ScriptedEngine({(100,): [scheduler.script("x")], (101,): [scheduler.script(CALL)]})
    maker = scheduler(engine, sandbox)

    async def interrupt() -> None:
        await until(lambda: sandbox.running and maker.finished)
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        interruption = asyncio.create_task(interrupt())
        await maker.run(prompts(2))
        await interruption

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert [e.prompt for e in maker.finished] == [0]
    assert (sandbox.cancelled, sandbox.running) == (1, 0)
    assert engine.kv_budget.live_sequences == 0


async def test_a_bug_comes_out_as_it_is_and_stops_the_rest(scheduler, fake_sandbox) -> None:
    class Broken(fake_sandbox):
        async def submit(self, request):
            if request.code == "slow\n":
                return await super().submit(request)
            await asyncio.sleep(0.01)
            raise KeyError("a bug")

    sandbox = Broken(delay_s=60)
    scripts = {(100,): [scheduler.script("```py\nslow\n```")], (101,): [scheduler.script(CALL)]}
    engine = ScriptedEngine(scripts)
    with pytest.raises(KeyError, match="a bug"):
        await scheduler(engine, sandbox).run(prompts(2))
    assert (sandbox.cancelled, engine.kv_budget.live_sequences) == (1, 0)
    assert no_tasks_left()


async def test_two_bugs_at_once_come_out_together(scheduler, fake_sandbox) -> None:
    def broken(code: str) -> ExecutionResult:
        raise KeyError("a bug")

    engine = ScriptedEngine({p.token_ids: [scheduler.script(CALL)] for p in prompts(2)})
    with pytest.raises(ExceptionGroup) as caught:  # the two episodes go in step
        await scheduler(engine, fake_sandbox(broken)).run(prompts(2))
    assert [type(e) for e in caught.value.exceptions] == [KeyError, KeyError]
    assert no_tasks_left()


async def test_a_bug_in_the_reward_comes_out(scheduler) -> None:
    engine = ScriptedEngine({p.token_ids: [scheduler.script("x")] for p in prompts(1)})
    with pytest.raises(ZeroDivisionError):
        await scheduler(engine, reward=lambda t, r: 1 / 0).run(prompts(1))


async def test_infrastructure_failures_are_recorded_not_scored(scheduler, fake_sandbox) -> None:
    infra = ExecutionResult(Status.INFRA, error="pool gone")
    scripts = {
        (100,): [scheduler.script(CALL)],
        (101,): [Script((5, EOS), fail_at=1)],
        (102,): [scheduler.script("x")],
    }
    maker = scheduler(
        ScriptedEngine(scripts), fake_sandbox(lambda _: infra), reward=lambda t, r: float(r)
    )
    groups = await maker.run(prompts(3))
    endings = [g.trajectories[0].stop_reason for g in groups]
    assert endings == [StopReason.TOOL_FAILURE, StopReason.ENGINE_FAILURE, StopReason.EOS]
    assert [g.rewards for g in groups] == [[None], [None], [2.0]]


async def test_a_slow_reward_blocks_neither_the_loop_nor_admission(scheduler, until) -> None:
    release = threading.Event()

    def reward(trajectory, reference):
        release.wait(10)
        return 1.0

    engine = _Counting({p.token_ids: [scheduler.script("x")] for p in prompts(3)}, max_sequences=1)
    task = asyncio.create_task(scheduler(engine, reward=reward).run(prompts(3)))
    await until(lambda: engine.calls == 3 and not engine.kv_budget.live_sequences)
    assert not task.done()
    release.set()
    assert [g.rewards for g in await task] == [[1.0]] * 3


async def test_progress_and_metrics(scheduler) -> None:
    seen = []
    engine = ScriptedEngine(
        {p.token_ids: [scheduler.script("x")] for p in prompts(2)}, max_sequences=1, token_s=0.01
    )
    maker = scheduler(engine, group_size=2, progress=lambda e, done, n: seen.append((e, done, n)))
    await maker.run(prompts(2))
    assert [(done, n) for _, done, n in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(e.prompt, e.sample) for e, _, _ in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    queued = [e.trajectory.metrics["queue_s"] for e, _, _ in seen]
    assert queued == sorted(queued)
    assert queued[3] >= 3 * 0.015
    assert all(e.trajectory.metrics["episode_s"] >= 0.015 for e, _, _ in seen)


async def test_seeds_depend_on_base_prompt_and_sample_only(scheduler) -> None:
    engine = ScriptedEngine({p.token_ids: [scheduler.script("x")] for p in prompts(3)})
    maker = scheduler(engine, group_size=4, sampling=SamplingParams(seed=5))
    seeds = [[t.seed for t in g.trajectories] for g in await maker.run(prompts(3))]
    assert seeds == [[trajectory_seed(5, p, s) for s in range(4)] for p in range(3)]
    assert len({s for row in seeds for s in row}) == 12
    narrow = scheduler(engine, group_size=4, max_live=1, sampling=SamplingParams(seed=5))
    again = await narrow.run(prompts(3))
    assert [[t.seed for t in g.trajectories] for g in again] == seeds


async def test_a_part_of_a_batch_is_sampled_as_in_the_whole(scheduler) -> None:
    engine = ScriptedEngine({p.token_ids: [scheduler.script("x")] for p in prompts(4)})
    maker = scheduler(engine, group_size=2, sampling=SamplingParams(seed=5))
    whole = await maker.run(prompts(4))
    numbered = [replace(prompt, number=i) for i, prompt in enumerate(prompts(4))]
    part = await maker.run(numbered[1::2])
    assert [[t.seed for t in g.trajectories] for g in part] == [
        [t.seed for t in g.trajectories] for g in whole[1::2]
    ]


def test_seeds_are_fixed_for_ever() -> None:
    """Replaying an old rollout needs the very same seeds: this number must not change."""
    assert trajectory_seed(5, 0, 0) == 6642952805051802156
    assert 0 <= trajectory_seed(2**64 - 1, 2**40, 7) < 2**63


async def test_two_schedulers_may_share_an_engine(scheduler) -> None:
    engine = ScriptedEngine({(100,): [scheduler.script("xxx"), scheduler.script("y")]})
    one, other = scheduler(engine), scheduler(engine)
    groups = await asyncio.gather(one.run(prompts(1)), other.run(prompts(1)))
    assert [len(g[0].trajectories[0].response_ids) for g in groups] == [4, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_live": 0}, "max_live is 0, expected 1 to 256"),
        ({"max_live": 257}, "max_live is 257, expected 1 to 256"),
        ({"group_size": 0}, "group_size is 0, expected >= 1"),
    ],
)
def test_settings_out_of_range(scheduler, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler(ScriptedEngine({}), **options)
