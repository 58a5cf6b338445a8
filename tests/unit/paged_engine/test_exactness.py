"""What the engine samples, and the log-probs it reports, are what the plain model says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thor_fast.engines.base import FinishReason
from thor_fast.engines.fused_model import fuse
from thor_fast.engines.model_twin import forward, probe, shadow
from thor_fast.engines.paged import PagedEngine
from thor_fast.engines.paged_attention import Chunk, KVPool, PagedStep

Make = Callable[..., Any]

# Log-probs of a float32 model against the same model's one-shot forward: other summation orders in
# attention and matmul. Measured on these models: 6e-6 at most.
LOGPROB_TOLERANCE = 5e-5
LOGIT_TOLERANCE = 1e-4


def prompt(n: int, start: int = 1) -> list[int]:
    return [(start * 7 + 5 * i) % 61 for i in range(n)]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_ragged_batch_matches_a_plain_forward(
    make: Make, family: str, temperature: float
) -> None:
    driver = make(family, max_sequences=3)
    # Five sequences, three at a time: two of them start when others have gone.
    prompts = [prompt(n, n) for n in (1, 2, 17, 40, 63)]

    async def one(i: int) -> tuple[list[int], list[float], FinishReason]:
        out = await driver.generate(
            prompts[i], 9 + 3 * i, session=f"s{i}", temperature=temperature, seed=i
        )
        await driver.engine.release(f"s{i}")
        return out

    results = await asyncio.gather(*[one(i) for i in range(5)])
    for ids, (tokens, logprobs, finish) in zip(prompts, results, strict=True):
        assert finish is FinishReason.LENGTH
        truth = driver.truth(ids + tokens, len(tokens), temperature)
        np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
async def test_greedy_equals_generate(make: Make, family: str) -> None:
    driver = make(family)
    for n in (3, 29):
        ids = prompt(n, n)
        tokens, _, _ = await driver.generate(ids, 30, session=str(n), temperature=0.0)
        inputs = torch.tensor([ids])
        expected = driver.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=30, do_sample=False
        )
        assert ids + tokens == expected[0].tolist()


async def test_a_seed_gives_the_same_tokens_in_any_batch(make: Make) -> None:
    driver = make(max_sequences=8)
    ids = prompt(20)
    sampling = {"seed": 12345, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
    alone = await driver.generate(ids, 25, session="alone", **sampling)
    crowd = [
        driver.generate(prompt(5 + 9 * i, i), 11 + 5 * i, session=f"c{i}", seed=i) for i in range(5)
    ]
    again, *_ = await asyncio.gather(driver.generate(ids, 25, session="again", **sampling), *crowd)
    assert again[0] == alone[0]
    np.testing.assert_allclose(again[1], alone[1], atol=LOGPROB_TOLERANCE)
    other, _, _ = await driver.generate(ids, 25, session="other", **{**sampling, "seed": 12346})
    assert other != alone[0]


async def test_noise_belongs_to_the_position_not_to_the_call(make: Make) -> None:
    driver = make()
    ids = prompt(11)
    whole, _, _ = await driver.generate(ids, 12, session="whole", seed=3)
    first, _, _ = await driver.generate(ids, 5, session="parts", seed=3)
    second, _, _ = await driver.generate(ids + first, 7, session="parts", seed=3)
    assert first + second == whole


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_every_step_layout_gives_the_model_own_logits(
    models: Any, family: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows gathered alone, in groups and all at once, and prefill next to each of them."""
    model = models[family]
    twin = shadow(model)
    run = partial(forward, twin)
    if fused:
        faster = fuse(twin)
        assert faster is not None
        run = faster.forward
    pool = KVPool(40, 16, 3, probe(twin).keys)
    texts = {name: prompt(30 + name, name + 1) for name in range(9)}
    order = np.random.default_rng(0).permutation(40)
    blocks = {name: [int(b) for b in order[3 * name : 3 * name + 3]] for name in texts}
    with torch.inference_mode():
        truth = {n: model(torch.tensor([ids])).logits[0] for n, ids in texts.items()}
        for n, ids in texts.items():
            run(PagedStep(pool, [Chunk(blocks[n], 0, ids[: 10 + n])]))
        for names, at_once in itertools.product(
            ([2, 1, 0], [7], [8, 5, 0], range(8, -1, -1)), (1, 2, 99)
        ):
            monkeypatch.setattr(pool, "rows_at_once", lambda blocks, n=at_once: n)
            decode = [Chunk(blocks[n], 10 + n, texts[n][10 + n : 11 + n]) for n in names]
            rest = [n for n in texts if n not in names][:2]
            prefill = [Chunk(blocks[n], 4, texts[n][4 : 9 + n]) for n in rest]
            prefill += [Chunk(blocks[n], 0, texts[n][:20]) for n in rest[1:]]
            logits = run(PagedStep(pool, decode + prefill[:2]))
            ends = [11 + n for n in names] + [c.start + len(c.ids) for c in prefill[:2]]
            where = [*names, *rest[: len(prefill[:2])]]
            for row, n, end in zip(logits, where, ends, strict=True):
                torch.testing.assert_close(row, truth[n][end - 1], atol=LOGIT_TOLERANCE, rtol=0)


async def test_a_long_prompt_is_prefilled_in_pieces_while_others_decode(make: Make) -> None:
    driver = make(max_sequences=2, max_context=2048, max_position_embeddings=2048)
    long = prompt(1300)
    order: list[str] = []

    def note(name: str) -> Callable[[int], bool]:
        def watch(token: int) -> bool:
            order.append(name)
            return False

        return watch

    first = asyncio.create_task(driver.generate(prompt(5), 60, session="a", watch=note("a")))
    await driver.until(lambda: len(order) >= 3)
    tokens, logprobs, _ = await driver.generate(long, 4, session="b", watch=note("b"))
    await first
    # 1300 tokens take three steps of at most 512; the other sequence advanced in each of them.
    assert order[order.index("b") :].count("a") > 0
    assert order[: order.index("b")].count("a") >= 3 + 2
    assert driver.engine.counters.prefill_tokens == 1300 + 5
    assert driver.engine.counters.decode_tokens == 64
    truth = driver.truth(long + tokens, 4)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)


async def test_only_what_is_new_is_prefilled(make: Make) -> None:
    driver = make()
    ids = prompt(30)
    tokens, _, _ = await driver.generate(ids, 6)
    context = ids + tokens + prompt(9, 50)
    tokens, logprobs, _ = await driver.generate(context, 5)
    # The last sampled token was never fed back, so it is computed with the 9 new ones.
    assert driver.prefill == [30, 10]
    truth = driver.truth(context + tokens, 5)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    # A context that departs from the cached one is computed from there on.
    other = [*context[:20], (context[20] + 1) % 61, *context[21:]]
    tokens, logprobs, _ = await driver.generate(other, 5)
    assert driver.prefill[-1] == len(other) - 20
    truth = driver.truth(other + tokens, 5)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
    # A context known to the last token still needs that token's logits.
    await driver.generate(other[:10], 1)
    assert driver.prefill[-1] == 1


async def test_new_weights_void_the_cache_and_raise_the_version(make: Make) -> None:
    driver = make("llama", initializer_range=0.29)
    ids = prompt(15)
    tokens, _, _ = await driver.generate(ids, 3)
    with torch.no_grad():
        for parameter in driver.model.parameters():
            parameter.mul_(1.1)
    assert driver.engine.weight_version == 0
    await driver.engine.update_weights(4)
    assert driver.engine.weight_version == 4
    tokens2, logprobs, _ = await driver.generate(ids + tokens, 6)
    assert driver.prefill == [15, 18]
    truth = driver.truth(ids + tokens + tokens2, 6)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)


NAMES = ["open", "generate", "fork", "truncate", "release", "weights"]
operations = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(1, 3), st.floats(0, 1)),
    min_size=2,
    max_size=8,
)


@settings(max_examples=15, deadline=None)
@given(plan=operations)
def test_any_mix_of_fork_truncate_release_and_resume_is_exact(
    models: Any, driver_class: Any, plan: Any
) -> None:
    asyncio.run(_play(models["qwen3"], driver_class, plan))


async def _play(model: Any, driver_class: Any, plan: list[tuple[str, int, Any, Any]]) -> None:
    """A pool of one long sequence, so that sessions lose their KV, running or not."""
    engine = PagedEngine(model, max_sequences=3, max_context=128, kv_tokens=128, block_size=8)
    driver = driver_class(engine, model)
    known: dict[str, list[int]] = {}
    fresh = itertools.count()
    try:
        for name, which, a, b in plan:
            if not known or name == "open":
                known[f"s{next(fresh)}"] = []
            session = sorted(known)[which % len(known)]
            if name in ("open", "generate"):
                ids = [*known[session], *prompt(1 + which, which)]
                known[session] = ids + await _extend(driver, session, ids, 3)
            elif not known[session]:
                continue
            elif name == "fork":
                at = int(b * len(known[session]))
                for child in await engine.fork(session, a, at):
                    known[child] = known[session][:at]
            elif name == "truncate":
                await engine.truncate(session, int(b * len(known[session])))
                known[session] = known[session][: int(b * len(known[session]))]
            elif name == "release":
                await engine.release(session)
                del known[session]
            else:
                await engine.update_weights(engine.weight_version + 1)
        await asyncio.gather(*[_finish(driver, engine, s, ids) for s, ids in known.items()])
        budget = engine.kv_budget
        assert (budget.live_sequences, budget.live_tokens) == (0, 0)
    finally:
        await engine.aclose()


async def _extend(driver: Any, session: str, ids: list[int], n: int) -> list[int]:
    tokens, logprobs, _ = await driver.generate(ids, n, session=session, seed=len(ids))
    np.testing.assert_allclose(logprobs, driver.truth(ids + tokens, n), atol=LOGPROB_TOLERANCE)
    assert len(tokens) == n
    return list(tokens)


async def _finish(driver: Any, engine: PagedEngine, session: str, ids: list[int]) -> None:
    await _extend(driver, session, [*ids, 7, 11], 4)
    await engine.release(session)


async def test_the_model_is_left_alone(make: Make) -> None:
    """Training mode, attention and weights stay the caller's, also while the engine runs."""
    driver = make("llama", attention_dropout=0.5)
    driver.model.train()
    before = {name: id(p) for name, p in driver.model.named_parameters()}
    implementation = driver.model.config._attn_implementation
    tokens, logprobs, _ = await driver.generate(prompt(9), 12)
    assert driver.model.training
    assert driver.model.config._attn_implementation == implementation
    assert {name: id(p) for name, p in driver.model.named_parameters()} == before
    driver.model.eval()
    truth = driver.truth(prompt(9) + tokens, 12)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)


async def test_replaced_parameters_are_seen_after_update_weights(make: Make) -> None:
    driver = make("llama", initializer_range=0.28)
    head = driver.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    await driver.engine.update_weights(1)
    tokens, logprobs, _ = await driver.generate(prompt(9), 6)
    truth = driver.truth(prompt(9) + tokens, 6)
    np.testing.assert_allclose(logprobs, truth, atol=LOGPROB_TOLERANCE)
