"""Many episodes at once, each on its own task.

Admission is the only thing they share: as many are live as the engine's KV cache is thought to hold
until they end, so that few are evicted and prefilled again (see ``admission.py``). The
next one starts as soon as there is room, in the order of the prompts; nobody waits for a group or a
batch. Scoring happens after the room is given back, in a thread, so a slow reward delays neither
decoding nor admission.

Cancelling (Ctrl-C under ``asyncio.run`` does) cancels every task and waits for it; what had ended
before is in :attr:`RolloutScheduler.finished`. An exception that is not the record of an episode is
a bug or misuse: it stops everything and comes out as it is.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field, replace

from thor_fast.engines.base import Engine, SamplingParams
from thor_fast.errors import ConfigError
from thor_fast.rollout.admission import Admission, Seat
from thor_fast.rollout.backtrack import BacktrackPolicy, beginning
from thor_fast.rollout.early_gain import EarlyGain
from thor_fast.rollout.limits import RolloutLimits
from thor_fast.rollout.loop import run_episode
from thor_fast.rollout.memo import SnippetMemo
from thor_fast.rollout.prefix import SharedPrefix, Start
from thor_fast.rollout.seeds import trajectory_seed
from thor_fast.sandbox.base import Sandbox
from thor_fast.tools.base import Tool
from thor_fast.types import RolloutGroup, Trajectory

__all__ = ["Finished", "Prompt", "RolloutScheduler", "trajectory_seed"]

# Engines are shared between schedulers, so session names must differ between them, too.
_RUN_NUMBERS = itertools.count()
# Enough to tell what is usual, and not so many that a policy which changes is lagged behind.
_LENGTHS_KEPT = 256

Reward = Callable[[Trajectory, str], float | None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """``reference``: what the reward compares with. ``task_id``: kept in the group. ``number``:
    what its seeds are drawn from, by default its place among the prompts; so a part of a batch that
    runs elsewhere is sampled as in the whole. ``start``: an episode of this prompt that all samples
    go on from, each with a copy.
    """

    token_ids: tuple[int, ...]
    reference: str = ""
    task_id: str = ""
    number: int | None = None
    start: Trajectory | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished trajectory and where it belongs: sample ``sample`` of prompt ``prompt``."""

    prompt: int
    sample: int
    trajectory: Trajectory


@dataclass(slots=True)
class _Group:
    """What the samples of one prompt share."""

    index: int
    prompt: Prompt
    memo: SnippetMemo | None
    prefix: SharedPrefix | None = None

    def start(self, name: str, seat: Seat) -> AbstractAsyncContextManager[Start]:
        """How one sample begins."""
        if self.prefix is None:
            return nullcontext(Start(name, seat.grown))
        return self.prefix.start(name, seat.grown)


@dataclass(slots=True)
class _Run:
    """One call of ``as_completed``: what came in, what came out."""

    prompts: Sequence[Prompt]
    name: str
    admission: Admission
    started: float = field(default_factory=time.perf_counter)
    finished: list[Finished] = field(default_factory=list)
    ended: asyncio.Queue[Finished | None] = field(default_factory=asyncio.Queue)


class RolloutScheduler:
    """Samples ``group_size`` trajectories per prompt.

    ``encode``: observation text -> ids. ``sampling.seed`` is the base of all seeds: a trainer sets
    another one in :attr:`sampling` for each step. ``reward(trajectory, reference)`` is called in a
    thread for each trajectory that the infrastructure did not spoil. ``max_live``: at most the
    engine's ``kv_budget.max_sequences``, which is the default. ``memo``: equal pure snippets of a
    group run once (see ``memo.py``). ``backtrack``, ``one_call``: as for :func:`run_episode`.
    ``progress(episode, done, total)`` is called in the event loop as episodes end.

    Each trajectory's ``metrics`` gain ``queue_s``, seconds from the start of the run to admission,
    and ``episode_s``, from there to its end.
    """

    def __init__(
        self,
        engine: Engine,
        sandbox: Sandbox,
        tool: Tool,
        *,
        encode: Callable[[str], Sequence[int]],
        limits: RolloutLimits,
        sampling: SamplingParams,
        eos_token_ids: frozenset[int],
        group_size: int = 1,
        reward: Reward | None = None,
        max_live: int | None = None,
        memo: bool = True,
        backtrack: BacktrackPolicy | None = None,
        one_call: bool = False,
        progress: Callable[[Finished, int, int], None] | None = None,
    ) -> None:
        budget = engine.kv_budget.max_sequences
        if max_live is None:
            max_live = budget
        if not 1 <= max_live <= budget:
            raise ConfigError(
                f"max_live is {max_live}, expected 1 to {budget}, the sequences the engine holds"
            )
        if group_size < 1:
            raise ConfigError(f"group_size is {group_size}, expected >= 1")
        if not eos_token_ids:
            raise ConfigError("eos_token_ids is empty, expected at least one id")
        self.sampling = sampling
        self.finished: list[Finished] = []
        self._engine, self._sandbox, self._tool = engine, sandbox, tool
        self._encode, self._limits, self._eos_token_ids = encode, limits, eos_token_ids
        self._group_size, self._max_live = group_size, max_live
        self._memo = memo and group_size > 1
        self._lengths: deque[int] = deque(maxlen=_LENGTHS_KEPT)
        self._backtrack, self._one_call = backtrack, one_call
        self._gain = EarlyGain()
        self._reward, self._progress = reward, progress

    async def run(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """One group per prompt, in the order of the prompts; samples in order within each."""
        groups = [RolloutGroup(p.token_ids, [], p.task_id) for p in prompts]
        async with aclosing(self.as_completed(prompts)) as stream:
            episodes = [episode async for episode in stream]
        for episode in sorted(episodes, key=lambda e: (e.prompt, e.sample)):
            groups[episode.prompt].trajectories.append(episode.trajectory)
        return groups

    async def as_completed(self, prompts: Sequence[Prompt]) -> AsyncGenerator[Finished, None]:
        """Episodes as they end, scored. Rollouts go on while the caller looks at one.

        Leave it early through ``contextlib.aclosing``: closing cancels what is still live.
        """
        admission = Admission(
            self._engine.kv_budget,
            self._lengths,
            max_live=max(1, min(self._max_live, len(prompts) * self._group_size)),
            growth=self._limits.max_response_tokens,
            max_context=self._engine.capabilities.max_context,
        )
        run = _Run(prompts, f"run{next(_RUN_NUMBERS)}", admission)
        self.finished = run.finished
        dispatcher = asyncio.create_task(self._dispatch(run))
        dispatcher.add_done_callback(lambda _: run.ended.put_nowait(None))
        try:
            while (episode := await run.ended.get()) is not None:
                yield episode
        finally:
            dispatcher.cancel()
            await asyncio.wait([dispatcher])
            if not dispatcher.cancelled():
                _reraise(dispatcher.exception())

    async def _dispatch(self, run: _Run) -> None:
        """Start each episode when there is room; ends when all have, or at the first error."""
        shares = self._engine.capabilities.prefix_cache
        async with asyncio.TaskGroup() as tasks:
            for index, prompt in enumerate(run.prompts):
                n_start = len(prompt.token_ids)
                if prompt.start is not None:
                    n_start += len(prompt.start.response_ids)
                group = _Group(index, prompt, SnippetMemo() if self._memo else None)
                if prompt.start is not None and self._engine.capabilities.native_fork:
                    group.prefix = SharedPrefix(self._engine, n_start)
                for sample in range(self._group_size):
                    seat = await run.admission.enter(n_start, group=index if shares else None)
                    tasks.create_task(self._episode(run, group, sample, seat))

    async def _episode(self, run: _Run, group: _Group, sample: int, seat: Seat) -> None:
        admitted = time.perf_counter()
        length = None
        try:
            async with group.start(f"{run.name}/{group.index}/{sample}", seat) as start:
                trajectory = await self._run(group, sample, start)
            stop = trajectory.stop_reason
            if stop is not None and not stop.is_infrastructure:
                length = len(trajectory)
        finally:
            run.admission.leave(seat, length)
        trajectory.metrics["queue_s"] = admitted - run.started
        trajectory.metrics["episode_s"] = time.perf_counter() - admitted
        await self._score(trajectory, group.prompt.reference)
        episode = Finished(group.index, sample, trajectory)
        run.finished.append(episode)
        run.ended.put_nowait(episode)
        if self._progress is not None:
            self._progress(episode, len(run.finished), len(run.prompts) * self._group_size)

    async def _run(self, group: _Group, sample: int, begin: Start) -> Trajectory:
        prompt = group.prompt
        number = group.index if prompt.number is None else prompt.number
        seed = trajectory_seed(self.sampling.seed, number, sample)
        start = prompt.start
        return await run_episode(
            self._engine,
            self._sandbox,
            self._tool,
            prompt.token_ids,
            self._limits,
            encode=self._encode,
            sampling=replace(self.sampling, seed=seed),
            eos_token_ids=self._eos_token_ids,
            session=begin.session,
            grown=begin.grown,
            first_tokens=begin.first_tokens,
            memo=group.memo,
            gain=self._gain,
            trajectory=None if start is None else beginning(start, len(start)),
            backtrack=self._backtrack,
            one_call=self._one_call,
        )

    async def _score(self, trajectory: Trajectory, reference: str) -> None:
        stop = trajectory.stop_reason
        if self._reward is None or stop is None or stop.is_infrastructure:
            return
        trajectory.reward = await asyncio.to_thread(self._reward, trajectory, reference)


def _reraise(error: BaseException | None) -> None:
    """Raise what went wrong; a lone error without the group that ``TaskGroup`` puts around it."""
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        raise error.exceptions[0]
    if error is not None:
        raise error
