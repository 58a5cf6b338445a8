"""As many are live as are thought to fit; a wrong guess costs prefill; nobody waits for ever."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines.base import KVBudget, SamplingParams
from thor_fast.engines.scripted import Script, ScriptedEngine
from thor_fast.rollout import (
    ObservationEncoder,
    Prompt,
    RolloutLimits,
    RolloutScheduler,
    run_episode,
)
from thor_fast.rollout.admission import Admission, Seat
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, Status, StopReason

EOS = 1
CALL = "```py\nx\n```"


def admission(pool: int, *, lengths=None, block=1, max_live=99, growth=100, context=10**6):
    return Admission(
        KVBudget(max_live, pool, 0, 0, block),
        [] if lengths is None else lengths,
        max_live=max_live,
        growth=growth,
        max_context=context,
    )


async def enter(shared: Admission, n_prompt: int, group: int | None = None) -> Seat | None:
    """``None`` if it has to wait."""
    task = asyncio.create_task(shared.enter(n_prompt, group=group))
    await asyncio.sleep(0)
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait([task])
    return None


async def n_live(shared: Admission, n_prompt: int = 10) -> int:
    n = 0
    while await enter(shared, n_prompt) is not None:
        n += 1
    return n


async def test_a_pool_with_room_for_all_at_their_longest_takes_all() -> None:
    # Two blocks each, at most; with lengths of one more than the bound they would not be thought
    # to fit, and with one block less the guess decides.
    assert await n_live(admission(16 * 4, block=16, max_live=2, growth=20)) == 2
    assert await n_live(admission(64, lengths=[60] * 8, block=16, max_live=2, growth=20)) == 2
    assert await n_live(admission(48, lengths=[60] * 8, block=16, max_live=2, growth=20)) == 1


async def test_the_context_bounds_what_may_be_needed() -> None:
    assert await n_live(admission(100, lengths=[90] * 8, max_live=2, context=50)) == 2
    assert await n_live(admission(99, lengths=[90] * 8, max_live=2, context=50)) == 1


async def test_full_blocks_of_a_prompt_count_once_for_its_group() -> None:
    def pool() -> Admission:
        return admission(16 * 10, block=16, lengths=[16] * 8, growth=16)

    # Prompts of 33 tokens, 16 more and half a block: 57 of 160, 32 of which a group holds together.
    alone, different = pool(), pool()
    assert await n_live(alone, 33) == 2
    groups = [await enter(different, 33, group) for group in range(3)]
    assert [seat is not None for seat in groups] == [True, True, False]
    same = pool()
    siblings = [await enter(same, 33, 0) for _ in range(6)]
    assert [seat is not None for seat in siblings] == [True] * 5 + [False]
    # As long as one of them is there, so is what they share.
    assert siblings[0] is not None
    same.leave(siblings[0])
    assert await enter(same, 33, 0) is not None
    assert await enter(same, 33, 0) is None


async def test_a_sixteenth_of_the_bound_is_expected_until_lengths_are_known() -> None:
    # A prompt of 10, 6 more, and half a token for the last block.
    assert await n_live(admission(330, lengths=[40] * 7)) == 330 // 16.5
    assert await n_live(admission(330, lengths=[40] * 8)) == 330 // 50.5


async def test_who_has_nearly_ended_makes_room_for_the_next() -> None:
    # Two prompts of 10 that grow by 40 do not fit side by side; behind 31 of the first, they do.
    shared = admission(99, lengths=[40] * 8)
    one = await shared.enter(10)
    assert await enter(shared, 10) is None
    one.grown(41)
    assert await enter(shared, 10) is not None


async def test_one_that_is_rolled_back_has_it_all_before_it_again() -> None:
    shared = admission(99, lengths=[40] * 8)
    one = await shared.enter(10)
    one.grown(41)
    one.grown(11)
    assert await enter(shared, 10) is None


async def test_one_that_has_outgrown_others_is_expected_to_grow_as_the_longer_ones_did() -> None:
    shared = admission(400, lengths=[5] * 8 + [90] * 2)
    one = await shared.enter(10)
    one.grown(41)  # 31 grown: 90 are usual for such
    # 100 for that one. The others, 15 each and half a token, end before it does.
    assert await n_live(shared) == (400 - 41 - 5) // 16


async def test_half_fit_what_is_expected() -> None:
    lengths = [*range(1, 11)]
    random.Random(1).shuffle(lengths)
    # A prompt of 10, 6 more, and half a token for the last block.
    assert await n_live(admission(330, lengths=lengths)) == 330 // 16.5


async def test_one_is_live_however_small_the_pool() -> None:
    shared = admission(5)
    one = await shared.enter(10)
    assert await enter(shared, 1) is None
    shared.leave(one)
    assert await enter(shared, 1) is not None


async def test_first_come_first_served() -> None:
    shared = admission(100, lengths=[40] * 8)
    one = await shared.enter(10)
    large, small = (asyncio.create_task(shared.enter(n)) for n in (60, 1))
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done()  # though it would fit
    shared.leave(one)
    await asyncio.sleep(0)
    assert large.done()
    assert not small.done()
    shared.leave(await large)
    await small


async def test_a_cancelled_entrance_is_no_longer_in_line() -> None:
    shared = admission(60)
    one = await shared.enter(50)
    first, second = asyncio.create_task(shared.enter(10)), asyncio.create_task(shared.enter(10))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not second.done()
    shared.leave(one)
    await second


@settings(deadline=None, max_examples=100)
@given(
    block=st.sampled_from([1, 4, 16]),
    pool_blocks=st.integers(4, 60),
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 80)), max_size=25),
    known=st.lists(st.integers(1, 80), max_size=12),
    seed=st.integers(0, 99),
)
def test_any_lengths_in_any_order_all_end(block, pool_blocks, sizes, known, seed) -> None:
    """And where all are as long as was thought, the pool is never exceeded."""
    shared = admission(pool_blocks * block, lengths=known, block=block, growth=80)
    rng = random.Random(seed)
    held: dict[int, int] = {}
    as_thought = len(known) >= 8 and len(set(known)) == 1

    async def one(number: int, n_prompt: int, n_response: int) -> None:
        seat = await shared.enter(n_prompt)
        n, end = n_prompt, n_prompt + (known[0] if as_thought else n_response)
        held[number] = n
        while n < end:
            n = min(n + rng.randint(1, 16), end)
            held[number] = n
            seat.grown(n)
            await asyncio.sleep(0)
        if as_thought:
            assert sum(held.values()) <= pool_blocks * block or len(held) == 1
        del held[number]
        shared.leave(seat, n)

    async def main() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for number, (n_prompt, n_response) in enumerate(sizes):
                tasks.create_task(one(number, n_prompt, n_response))

    asyncio.run(main())
    assert not held


def scheduler(tokenizer, sandbox, engine, **options) -> RolloutScheduler:
    return RolloutScheduler(
        engine,
        sandbox,
        PythonTool(tokenizer),
        encode=ObservationEncoder(tokenizer),
        limits=RolloutLimits(max_response_tokens=190),
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
        **options,
    )


@pytest.mark.parametrize("block", [1, 8])
async def test_a_small_pool_changes_no_token_and_few_lose_their_kv(
    tokenizers, fake_sandbox, block
) -> None:
    rng = random.Random(3)
    texts = ["x" * rng.randrange(60) + CALL * rng.randrange(3) for _ in range(40)]
    tokenizer = tokenizers.bytes
    scripts = {
        (100 + i,): [Script((*tokenizer.encode(text).ids, EOS))] for i, text in enumerate(texts)
    }
    engine = ScriptedEngine(scripts, max_context=200, kv_tokens=400, block_tokens=block)
    sandbox = fake_sandbox(lambda _: ExecutionResult(Status.OK, "1\n"))
    prompts = [Prompt((100 + i,)) for i in range(40)]
    groups = await scheduler(tokenizer, sandbox, engine).run(prompts)
    ended = [g.trajectories[0] for g in groups]
    assert {t.stop_reason for t in ended} == {StopReason.EOS}
    for text, trajectory in zip(texts, ended, strict=True):
        sampled = [t for t, m in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if m]
        assert sampled == [*tokenizer.encode(text).ids, EOS]
    assert engine.kv_budget.live_tokens == 0
    assert engine.evictions <= 20


async def test_no_call_is_cut(tokenizers, fake_sandbox) -> None:
    tokenizer = tokenizers.bytes
    ids = tokenizer.encode("x" * 80 + "\n" + CALL + "\n" + "y" * 20).ids
    engine = ScriptedEngine({(100,): [Script((*ids, EOS))]}, max_context=200, kv_tokens=150)
    sandbox = fake_sandbox(lambda _: ExecutionResult(Status.OK, "1\n"))
    two = scheduler(tokenizer, sandbox, engine, group_size=2, memo=False)
    (group,) = await two.run([Prompt((100,))])
    assert [t.metrics["engine_calls"] for t in group.trajectories] == [2, 2]


async def test_a_first_call_may_be_short_and_growth_is_told(tokenizers, fake_sandbox) -> None:
    tokenizer = tokenizers.bytes
    script = Script((*tokenizer.encode("so\n```py\nprint(1)\n```").ids, EOS))
    told: list[int] = []
    trajectory = await run_episode(
        ScriptedEngine({(5,): [script]}, chunk_tokens=4),
        fake_sandbox(),
        PythonTool(tokenizer),
        (5,),
        RolloutLimits(),
        encode=ObservationEncoder(tokenizer),
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
        session="s",
        grown=told.append,
        first_tokens=1,
    )
    assert trajectory.stop_reason is StopReason.EOS
    assert [call.code for call in trajectory.tool_calls] == ["print(1)\n"]
    assert trajectory.metrics["engine_calls"] == 3
    # One, then fours; before each call and after each chunk but its last.
    assert told[:4] == [1, 2, 6, 10]
    assert told == sorted(told)
    assert len(trajectory) - 4 <= told[-1] < len(trajectory)
