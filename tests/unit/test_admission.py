"""Nobody is evicted because too many are live, nobody waits for ever, and few wait at all."""

from __future__ import annotations

import asyncio
import random
from functools import partial

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
from thor_fast.rollout.admission import Admission, Allowance
from thor_fast.tools import PythonTool
from thor_fast.types import ExecutionResult, Status, StopReason

EOS = 1
CALL = "```py\nx\n```"


def admission(
    pool: int, *, lengths=None, block=1, max_live=99, running=None, growth=100, context=10**6
):
    budget = KVBudget(max_live, pool, 0, 0, block, running)
    return Admission(
        budget,
        [] if lengths is None else lengths,
        max_live=max_live,
        growth=growth,
        max_context=context,
    )


async def enter(shared: Admission, n_prompt: int, group: int | None = None) -> Allowance | None:
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


async def test_a_pool_with_room_for_all_grants_everything_at_once() -> None:
    shared = admission(16 * 4, block=16, max_live=2, growth=20)
    one = await shared.enter(10)
    assert (one.granted, one.most) == (2, 2)
    assert await shared.room(one, 10) == 22
    assert await n_live(shared) == 1  # with that, as many as max_live allows


async def test_full_blocks_of_a_prompt_count_once_for_its_group() -> None:
    def pool() -> Admission:
        return admission(16 * 10, block=16, lengths=[16] * 8, growth=16)

    # Prompts of 33 tokens and grants of 4 blocks, 2 of which a group holds together.
    alone, different = pool(), pool()
    assert await n_live(alone, 33) == 10 // 4
    groups = [await enter(different, 33, group) for group in range(3)]
    assert [allowance is not None for allowance in groups] == [True, True, False]
    same = pool()
    siblings = [await enter(same, 33, 0) for _ in range(5)]
    assert [allowance is not None for allowance in siblings] == [True] * 4 + [False]
    # As long as one of them is there, so is what they share.
    assert siblings[0] is not None
    same.leave(siblings[0])
    assert await enter(same, 33, 0) is not None
    assert await enter(same, 33, 0) is None


async def test_what_an_episode_begins_with_may_count_as_growth() -> None:
    shared = admission(100, max_live=2, growth=20)
    one = await shared.enter(30, 15)
    assert (one.granted, one.most) == (35, 35)
    assert await shared.room(one, 30) == 5
    used_up = await shared.enter(30, 20)
    assert used_up.most == 31


async def test_a_sixteenth_of_the_bound_is_expected_until_lengths_are_known() -> None:
    # Grants of 42: a prompt of 10 and the smallest raise.
    assert await n_live(admission(330, lengths=[40] * 7)) == 330 // 42
    # Now each is thought to come to 50, and half a token for its last block.
    assert await n_live(admission(330, lengths=[40] * 8)) == 330 // 51


async def test_who_has_nearly_ended_makes_room_for_the_next() -> None:
    # Two prompts of 10 that grow by 40 do not fit side by side; behind 31 of the first, they do.
    shared = admission(99, lengths=[40] * 8)
    one = await shared.enter(10)
    assert await enter(shared, 10) is None
    await shared.room(one, 41)
    assert await enter(shared, 10) is not None


async def test_a_grant_that_is_nearly_used_up_is_raised_where_a_call_ends_anyway() -> None:
    shared = admission(200, lengths=[20] * 8)
    one = await shared.enter(10)
    assert await shared.room(one, 26) == 16  # enough
    assert await shared.room(one, 30) == 16  # of 12
    full = admission(42, lengths=[20] * 8)
    one = await full.enter(10)
    assert await full.room(one, 30) == 16  # alone, it has what it wants
    shared = admission(84, lengths=[20] * 8)
    one, _ = [await shared.enter(10) for _ in range(2)]
    assert await shared.room(one, 30) == 12  # and does not wait for more


async def test_one_that_has_outgrown_others_is_expected_to_grow_as_the_longer_ones_did() -> None:
    shared = admission(400, lengths=[5] * 8 + [90] * 2)
    one = await shared.enter(10)
    await shared.room(one, 41)  # 31 grown: 90 are usual for such
    # 100 for that one. The others, 15 each, and all but the last end before it.
    assert await n_live(shared) == 8


async def test_half_fit_their_first_grant() -> None:
    lengths = [*range(1, 11)]
    random.Random(1).shuffle(lengths)
    assert admission(10**3, lengths=lengths).expected_growth == 6


async def test_twice_what_decodes_at_a_time_is_live_and_has_all_the_room() -> None:
    # 42 would do; but no more than 2 x 3 could gain by being live.
    shared = admission(400, lengths=[5] * 8, running=3)
    one = await shared.enter(10)
    assert one.granted == 400 // 6
    assert await n_live(shared) == 5


async def test_a_quarter_of_what_is_usual_is_granted_and_at_least_32() -> None:
    assert (await admission(400, lengths=[5] * 8, running=50).enter(10)).granted == 42
    assert (await admission(400, lengths=[80] * 8, running=50, growth=200).enter(10)).granted == 42
    usual = admission(4000, lengths=[800] * 8, running=50, growth=2000)
    assert (await usual.enter(10)).granted == 210


async def test_one_is_live_however_small_the_pool() -> None:
    shared = admission(5)
    one = await shared.enter(10)
    assert await shared.room(one, 109) == 1
    assert await enter(shared, 1) is None
    shared.leave(one)
    assert await enter(shared, 1) is not None


async def test_the_context_bounds_what_is_set_aside() -> None:
    one = await admission(10**4, context=50).enter(10)
    assert one.most == 50


async def test_who_needs_more_waits_until_another_ends() -> None:
    # Three of 42, and four more.
    shared = admission(3 * 42 + 4, lengths=[20] * 8)
    old, young, other = [await shared.enter(10) for _ in range(3)]
    assert await shared.room(young, 41) == 1
    assert await shared.room(young, 42) == 1  # what there is, rather than nothing
    assert await shared.room(young, 43) == 1
    assert await shared.room(young, 44) == 1
    assert await shared.room(young, 45) == 1
    asking = asyncio.create_task(shared.room(young, 46))
    newcomer = asyncio.create_task(shared.enter(1))
    await asyncio.sleep(0)
    assert not asking.done()
    assert not newcomer.done()
    shared.leave(other)
    assert await asking == 32
    assert not newcomer.done()
    shared.leave(old)
    assert (await newcomer).granted > 0


async def test_the_youngest_of_those_that_wait_gives_its_room_back() -> None:
    shared = admission(3 * 42, lengths=[20] * 8)
    old, middle, young = [await shared.enter(10) for _ in range(3)]
    forgotten: list[str] = []

    def forgets(name: str):
        async def forget() -> None:
            forgotten.append(name)
            await asyncio.sleep(0)
            assert sum(a.granted for a in (old, middle, young)) <= 3 * 42

        return forget

    old.forget, middle.forget, young.forget = map(forgets, ("old", "middle", "young"))
    asking = [asyncio.create_task(shared.room(young, 42))]
    await asyncio.sleep(0.01)
    assert not forgotten  # two go on
    asking.append(asyncio.create_task(shared.room(old, 42)))
    assert await asking[1] == 32
    assert forgotten == ["young"]
    await asyncio.sleep(0.01)
    assert not asking[0].done()
    shared.leave(middle)
    assert await asking[0] > 0
    assert forgotten == ["young"]


async def test_one_cancelled_while_its_kv_is_forgotten_is_gone() -> None:
    shared = admission(2 * 42, lengths=[20] * 8)
    old, young = [await shared.enter(10) for _ in range(2)]
    forgetting = asyncio.Event()

    async def forget() -> None:
        forgetting.set()
        await asyncio.Event().wait()

    young.forget = forget
    asking = [asyncio.create_task(shared.room(a, 42)) for a in (young, old)]
    await forgetting.wait()
    asking[0].cancel()
    await asyncio.wait([asking[0]])
    shared.leave(young)
    assert await asking[1] == 32


async def test_a_cancelled_entrance_is_no_longer_in_line() -> None:
    shared = admission(110)
    one = await shared.enter(10)
    assert await shared.room(one, 109) == 1  # all there is
    first, second = asyncio.create_task(shared.enter(10)), asyncio.create_task(shared.enter(10))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    shared.leave(one)
    assert (await second).granted > 0


@settings(deadline=None, max_examples=100)
@given(
    block=st.sampled_from([1, 4, 16]),
    pool_blocks=st.integers(4, 60),
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 80)), max_size=25),
    known=st.lists(st.integers(1, 80), max_size=12),
    seed=st.integers(0, 99),
)
def test_any_lengths_in_any_order_fit_and_all_end(block, pool_blocks, sizes, known, seed) -> None:
    """Prompts and responses of any length, grown in random steps: the pool is never exceeded."""
    pool = pool_blocks * block
    shared = admission(pool, lengths=known, block=block, growth=80)
    rng = random.Random(seed)
    held: dict[int, int] = {}

    async def forget(number: int) -> None:
        await asyncio.sleep(0)
        held.pop(number, None)

    async def one(number: int, n_prompt: int, n_response: int) -> None:
        allowance = await shared.enter(n_prompt)
        allowance.forget = partial(forget, number)
        n = n_prompt
        while n < n_prompt + n_response:
            room = await shared.room(allowance, n)
            n = min(n + rng.randint(1, room), n_prompt + n_response)
            held[number] = n
            blocks = sum(-(-tokens // block) for tokens in held.values())
            assert blocks <= pool_blocks or len(held) == 1
            await asyncio.sleep(0)
        del held[number]
        shared.leave(allowance, n)

    async def main() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for number, (n_prompt, n_response) in enumerate(sizes):
                tasks.create_task(one(number, n_prompt, n_response))

    asyncio.run(main())


@pytest.mark.parametrize("block", [1, 8])
async def test_a_scheduler_never_overfills_a_small_pool(tokenizers, fake_sandbox, block) -> None:
    # Beyond its budget this engine raises, which would show as ENGINE_FAILURE.
    rng = random.Random(3)
    texts = ["x" * rng.randrange(60) + CALL * rng.randrange(3) for _ in range(40)]
    tokenizer = tokenizers.bytes
    scripts = {
        (100 + i,): [Script((*tokenizer.encode(text).ids, EOS))] for i, text in enumerate(texts)
    }
    engine = ScriptedEngine(scripts, max_context=200, kv_tokens=400, block_tokens=block)
    scheduler = RolloutScheduler(
        engine,
        fake_sandbox(lambda _: ExecutionResult(Status.OK, "1\n")),
        PythonTool(tokenizer),
        encode=ObservationEncoder(tokenizer),
        limits=RolloutLimits(max_response_tokens=190),
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
    )
    groups = await scheduler.run([Prompt((100 + i,)) for i in range(40)])
    ended = [g.trajectories[0] for g in groups]
    assert {t.stop_reason for t in ended} == {StopReason.EOS}
    # What was sampled does not depend on where calls were cut.
    for text, trajectory in zip(texts, ended, strict=True):
        sampled = [t for t, m in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if m]
        assert sampled == [*tokenizer.encode(text).ids, EOS]
    assert engine.kv_budget.live_tokens == 0


async def test_no_call_is_cut_where_the_pool_holds_all_there_are(tokenizers, fake_sandbox) -> None:
    tokenizer = tokenizers.bytes
    ids = tokenizer.encode("x" * 80 + "\n" + CALL + "\n" + "y" * 20).ids
    engine = ScriptedEngine({(100,): [Script((*ids, EOS))]}, max_context=200, kv_tokens=400)
    scheduler = RolloutScheduler(
        engine,
        fake_sandbox(lambda _: ExecutionResult(Status.OK, "1\n")),
        PythonTool(tokenizer),
        encode=ObservationEncoder(tokenizer),
        limits=RolloutLimits(max_response_tokens=190),
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
        group_size=2,
        memo=False,
    )
    (group,) = await scheduler.run([Prompt((100,))])
    assert [t.metrics["engine_calls"] for t in group.trajectories] == [2, 2]


async def test_a_call_that_ran_out_of_room_goes_on(tokenizers, fake_sandbox) -> None:
    """The grant of 10 more tokens ends in the middle of a block, twice."""
    tokenizer = tokenizers.bytes
    script = Script((*tokenizer.encode("so\n```py\nprint(1)\n```").ids, EOS))
    asked: list[int] = []

    async def room(n_tokens: int) -> int:
        asked.append(n_tokens)
        return 10

    trajectory = await run_episode(
        ScriptedEngine({(5,): [script]}),
        fake_sandbox(),
        PythonTool(tokenizer),
        (5,),
        RolloutLimits(),
        encode=ObservationEncoder(tokenizer),
        sampling=SamplingParams(),
        eos_token_ids=frozenset({EOS}),
        session="s",
        room=room,
    )
    assert trajectory.stop_reason is StopReason.EOS
    assert [call.code for call in trajectory.tool_calls] == ["print(1)\n"]
    assert asked[:3] == [1, 11, 21]
    assert trajectory.metrics["resume_prefill_tokens"] < 40
    assert trajectory.metrics["room_s"] >= 0
