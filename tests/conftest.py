"""What tests of the loop share: small tokenizers that merge across fences, and a fake sandbox."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace

import pytest

from thor_fast.types import ExecutionRequest, ExecutionResult, Status

CORPUS = [
    "Let me compute.\n```python\nprint(6*7)\n```\n\nSo the answer is \\boxed{42}.<|im_end|>",
    "\n```python\nx = sum(range(10))\nprint(x)\n```\nwe have\n```py\nimport math\n```\n\n",
    "``` python\ndef f():\n    '''doc'''\n    return \"\"\"\n```\n\"\"\"\n```\n\n",
    "written in python\n```output\n42\n```\n```json\n{}\n```\n",
]


class FakeSandbox:
    """Keeps the Sandbox protocol; ``answer`` says what each snippet "did", after ``delay_s``."""

    def __init__(
        self,
        answer: Callable[[str], ExecutionResult] = lambda _: ExecutionResult(Status.OK, "42\n"),
        delay_s: float = 0.0,
    ) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.requests: list[ExecutionRequest] = []
        self.running = 0
        self.cancelled = 0

    def execute(self, request: ExecutionRequest | str) -> ExecutionResult:
        if isinstance(request, str):
            request = ExecutionRequest(request)
        self.requests.append(request)
        return self.answer(request.code)

    def execute_batch(self, requests) -> list[ExecutionResult]:
        return [self.execute(r) for r in requests]

    async def submit(self, request: ExecutionRequest | str) -> ExecutionResult:
        self.running += 1
        try:
            await asyncio.sleep(self.delay_s)
            return self.execute(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, tb) -> None:
        self.close()


@pytest.fixture(scope="session")
def fake_sandbox() -> type[FakeSandbox]:
    return FakeSandbox


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Waits for a condition to hold, a minute at most."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """SIGINT as on a terminal: what a shell starts in the background ignores it, children too."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def _byte_level(vocab_size: int, *, use_regex: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    return tokenizer


def _sentencepiece_style():
    """Llama 2's layout: a dummy prefix, spaces as U+2581, byte fallback, a decoder that fuses."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdefghijklmnoprstuxy`("]
    merges = [("`", "`"), ("``", "`"), ("\u2581", "```"), ("p", "y"), ("```", "py")]
    vocab = {w: i for i, w in enumerate([*words, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers():
    """By name: ``words`` (GPT-2's split), ``lines`` (merges anything with anything, so also across
    a fence and its newlines), ``bytes`` (no merges), ``sentencepiece``.
    """
    return SimpleNamespace(
        words=_byte_level(420, use_regex=True),
        lines=_byte_level(400, use_regex=False),
        bytes=_byte_level(258, use_regex=True),
        sentencepiece=_sentencepiece_style(),
    )


@pytest.fixture(params=["words", "lines", "bytes", "sentencepiece"])
def tokenizer(request, tokenizers):
    """Each of ``tokenizers`` in turn."""
    return getattr(tokenizers, request.param)
