"""The ways of rolling out that ``rollout_throughput.py`` compares, each measured the same way."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from barrier_rollout import barrier_rollout, changed_tokens
from metering import Meter, MeteredEngine, MeteredSandbox, MeteredStreams, RecordedSandbox
from report import Update
from resubmit_engine import ResubmittingEngine
from rollout_setup import Setup

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.errors import ThorError
from thor_fast.rewards import MathAnswerReward
from thor_fast.rewards.math_answer import answers_match, last_boxed
from thor_fast.rollout.renderer import Renderer
from thor_fast.rollout.scheduler import Prompt, RolloutScheduler, trajectory_seed
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.sandbox.base import Sandbox, StreamingSandbox
from thor_fast.synthetic import Task
from thor_fast.tools.python_tool import PythonTool
from thor_fast.tools.token_text import TokenBytes
from thor_fast.types import ExecutionResult, RolloutGroup

__all__ = ["MODES", "Result", "Rollouts"]

# THOR's RL setting.
SAMPLING = SamplingParams(temperature=1.0)

MODES = ("barrier", "barrier-loop", "resubmit", "ours", "free")


@dataclass(frozen=True, slots=True)
class Result:
    """One run of one mode; see :class:`metering.Meter` for what is not obvious.

    ``evictions``: sessions that lost KV they still needed, and calls interrupted for lack of room,
    as the engine counts them; ``None`` where it does not.
    """

    wall_s: float
    episodes: int
    correct: int
    sampled_tokens: int
    changed_tokens: int
    engine_calls: int
    prefill_tokens: int | None
    least_prefill_tokens: int
    calls_evicted: int | None
    evictions: int | None
    most_live_tokens: int
    tool_calls: int
    tool_s: float
    tools_hidden_s: float
    tools_exposed_s: float


class Rollouts:
    """Runs modes by name on one setup. ``free`` replays what the last run of ``ours`` recorded."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._recorded: dict[str, ExecutionResult] = {}

    async def run(self, mode: str, tasks: Sequence[Task], update: Update) -> Result:
        runs: Mapping[str, Callable[[Sequence[Task], Update], Awaitable[Result]]] = {
            "barrier": self._fresh_barrier,
            "barrier-loop": partial(self._barrier, self._setup.sandbox),
            "resubmit": self._resubmit,
            "ours": self._ours,
            "free": self._free,
        }
        # Nothing is found in the prefix cache that another run has left there.
        await self._setup.engine.update_weights(self._setup.engine.weight_version + 1)
        # Nor does Python's collector look through all that was there before, for a quarter of a
        # second, in the middle of whichever run it likes.
        gc.collect()
        gc.freeze()
        return await runs[mode](tasks, update)

    async def _resubmit(self, tasks: Sequence[Task], update: Update) -> Result:
        """Every call a new request with all tokens, all episodes at once, no early execution."""
        meter = Meter()
        engine = ResubmittingEngine(self._setup.engine)
        sandbox = MeteredSandbox(self._setup.sandbox, meter)
        return await self._schedule(meter, engine, sandbox, tasks, update, memo=False)

    async def _ours(self, tasks: Sequence[Task], update: Update) -> Result:
        meter = Meter()
        sandbox = self._setup.sandbox
        metered = (
            MeteredStreams(sandbox, meter)
            if isinstance(sandbox, StreamingSandbox)
            else MeteredSandbox(sandbox, meter)
        )
        return await self._schedule(
            meter, self._setup.engine, metered, tasks, update, memo=self._setup.memo
        )

    async def _free(self, tasks: Sequence[Task], update: Update) -> Result:
        """As ours, with tools that answer at once."""
        meter = Meter()
        sandbox = RecordedSandbox(self._setup.sandbox, meter, self._recorded)
        return await self._schedule(
            meter, self._setup.engine, sandbox, tasks, update, memo=self._setup.memo
        )

    async def _fresh_barrier(self, tasks: Sequence[Task], update: Update) -> Result:
        with self._setup.fresh() as sandbox:
            return await self._barrier(sandbox, tasks, update)

    async def _barrier(self, sandbox: Sandbox, tasks: Sequence[Task], update: Update) -> Result:
        """All episodes in rounds, text in between, eight snippets at a time."""
        setup, meter = self._setup, Meter()
        tokens = TokenBytes(setup.tokenizer)
        samples = [(task, i, n) for i, task in enumerate(tasks) for n in range(setup.group_size)]
        prompts = [
            (setup.prompt(task), trajectory_seed(setup.seed, i, n)) for task, i, n in samples
        ]
        lost = _lost_kv(setup.engine)
        started = time.perf_counter()
        episodes = await barrier_rollout(
            MeteredEngine(setup.engine, meter),
            MeteredSandbox(sandbox, meter),
            prompts,
            setup.limits,
            encode=setup.encode,
            tokens=tokens,
            sampling=SAMPLING,
            eos_token_ids=setup.eos_token_ids,
            progress=update,
        )
        wall_s = time.perf_counter() - started
        correct = 0
        for (task, _, _), episode in zip(samples, episodes, strict=True):
            answer = last_boxed(episode.said)
            correct += answer is not None and answers_match(answer, task.answer)
        changed = sum(changed_tokens(setup.encode, tokens, e) for e in episodes)
        return _result(
            meter, wall_s, len(episodes), correct, changed, _since(lost, _lost_kv(setup.engine))
        )

    async def _schedule(
        self,
        meter: Meter,
        engine: Engine,
        sandbox: Sandbox,
        tasks: Sequence[Task],
        update: Update,
        *,
        memo: bool,
    ) -> Result:
        """All episodes on their own, tokens in between."""
        setup = self._setup
        scheduler = RolloutScheduler(
            MeteredEngine(engine, meter),
            sandbox,
            PythonTool(setup.tokenizer),
            encode=ObservationEncoder(setup.tokenizer),
            limits=setup.limits,
            sampling=SamplingParams(temperature=SAMPLING.temperature, seed=setup.seed),
            eos_token_ids=setup.eos_token_ids,
            group_size=setup.group_size,
            memo=memo,
            progress=lambda _, done, total: update(done, total),
        )
        prompts = [Prompt(tuple(setup.encode(setup.prompt(task)))) for task in tasks]
        lost = _lost_kv(setup.engine)
        started = time.perf_counter()
        groups = await scheduler.run(prompts)
        wall_s = time.perf_counter() - started
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        failed = [
            t for t in trajectories if t.stop_reason is None or t.stop_reason.is_infrastructure
        ]
        if failed:
            raise ThorError(
                f"{len(failed)} of {len(trajectories)} episodes failed: {failed[0].error}"
            )
        self._recorded |= {
            call.code: call.result
            for trajectory in trajectories
            for call in trajectory.tool_calls
            if call.result is not None
        }
        reward = MathAnswerReward(Renderer(setup.tokenizer))
        correct = sum(
            reward(trajectory, task.answer) == 1.0
            for group, task in zip(groups, tasks, strict=True)
            for trajectory in group.trajectories
        )
        return _result(
            meter,
            wall_s,
            len(trajectories),
            correct,
            _changed(meter, groups),
            _since(lost, _lost_kv(setup.engine)),
        )


def _changed(meter: Meter, groups: Sequence[RolloutGroup]) -> int:
    """What the engine sampled, by its own record, against what stands in the trajectory."""
    final = {
        f"{i}/{n}": trajectory.token_ids
        for i, group in enumerate(groups)
        for n, trajectory in enumerate(group.trajectories)
    }
    return sum(
        final[session.partition("/")[2]][position] != token_id
        for session, sampled in meter.sampled.items()
        for position, token_id in sampled
    )


def _lost_kv(engine: Engine) -> int | None:
    counters = getattr(engine, "counters", None)
    return None if counters is None else counters.evictions + counters.preemptions


def _since(before: int | None, now: int | None) -> int | None:
    return None if before is None or now is None else now - before


def _result(
    meter: Meter, wall_s: float, episodes: int, correct: int, changed: int, evictions: int | None
) -> Result:
    return Result(
        wall_s=wall_s,
        episodes=episodes,
        correct=correct,
        sampled_tokens=meter.sampled_tokens,
        changed_tokens=changed,
        engine_calls=meter.engine_calls,
        prefill_tokens=meter.prefill_tokens,
        least_prefill_tokens=meter.least_prefill_tokens,
        calls_evicted=None if meter.prefill_tokens is None else meter.calls_evicted,
        evictions=evictions,
        most_live_tokens=meter.most_live_tokens,
        tool_calls=meter.tool_calls,
        tool_s=meter.tool_s,
        tools_hidden_s=meter.tools_hidden_s,
        tools_exposed_s=meter.tools_exposed_s,
    )
