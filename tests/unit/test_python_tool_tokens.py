"""Token id -> bytes, for each family of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor_fast.errors import ToolError
from thor_fast.rollout.splice import ObservationEncoder
from thor_fast.tools.token_text import TokenBytes

TEXT = "é 日本\u2581 \x00~\n```python\n\tx = '🎲'\r\n```"


def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer) -> None:
    ids = ObservationEncoder(tokenizer)(TEXT)
    # sentencepiece writes a space as the very mark that TEXT also holds
    expected = TEXT.replace("\u2581", " ") if tokenizer.token_to_id("<0x0A>") else TEXT
    spell = TokenBytes(tokenizer)
    assert b"".join(spell[i] for i in ids) == expected.encode()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_byte_level(tokenizers, text: str) -> None:
    for tokenizer in (tokenizers.words, tokenizers.lines, tokenizers.bytes):
        spell = TokenBytes(tokenizer)
        assert b"".join(spell[i] for i in ObservationEncoder(tokenizer)(text)) == text.encode()


def test_part_of_a_character_is_bytes(tokenizers) -> None:
    spell = TokenBytes(tokenizers.bytes)
    ids = tokenizers.bytes.encode("é").ids
    assert [spell[i] for i in ids] == [b"\xc3", b"\xa9"]


def test_added_tokens_give_their_text(tokenizer) -> None:
    assert TokenBytes(tokenizer)[tokenizer.token_to_id("<|im_end|>")] == b"<|im_end|>"


def test_ids_without_a_token_are_empty(tokenizers) -> None:
    assert TokenBytes(tokenizers.bytes)[100_000] == b""


def test_a_token_outside_the_alphabet_is_its_text() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"a b": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert TokenBytes(tokenizer)[0] == b"a b"
    assert tokenizer.decode([0]) == "a b"


def test_wrapped_by_transformers(tokenizers) -> None:
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.words)
    spell = TokenBytes(wrapped)
    assert b"".join(spell[i] for i in wrapped(TEXT)["input_ids"]) == TEXT.encode()


def test_metaspace() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"\u2581the": 0}, []))
    tokenizer.decoder = decoders.Metaspace()
    assert TokenBytes(tokenizer)[0] == b" the"


def test_decoders_that_mix_tokens_are_refused() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(ToolError, match="tokenizer has no decoder"):
        TokenBytes(tokenizer)
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ToolError, match=r"has the step .*WordPiece.*, expected only ByteLevel"):
        TokenBytes(tokenizer)
    tokenizer.decoder = decoders.Strip(" ", 1, 0)  # per token, as nothing was fused before
    with pytest.raises(ToolError, match="Strip"):
        TokenBytes(tokenizer)
