"""Text of a stream of ids, against decoding all of them at once."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graftlm.generation.text_stream import TextPiece, TextStream
from graftlm.testing import tiny_tokenizer

LETTERS = [
    "a",
    "b",
    "ab",
    ".",
    "\u2581",
    "\u2581a",
    "\u2581\u2581",
    "b\u2581",
    "\ufffd",
    "\u00e9",
    "##b",
    "a</w>",
    "\U0001f600",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def made(decoder: Any, words: list[str]) -> Any:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def llama_like() -> Any:
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return made(decoders.Sequence(parts), LETTERS + BYTES)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": tiny_tokenizer,
    "byte fallback": llama_like,
    "metaspace": lambda: made(decoders.Metaspace(), LETTERS),
    "word pieces": lambda: made(decoders.WordPiece(), LETTERS),
    "suffix": lambda: made(decoders.BPEDecoder(), LETTERS),
    "bytes as words": lambda: made(decoders.ByteLevel(), LETTERS + BYTES),
    "none": lambda: made(None, LETTERS),
}


def streamed(tokenizer: Any, ids: list[int], stop: list[str], keep: bool = False) -> tuple[list[TextPiece], Any]:
    stream = TextStream(tokenizer, stop, keep_special=keep)
    pieces = [stream.add(token) for token in ids]
    return [piece for piece in [*pieces, stream.close()] if piece is not None], stream.stopped_by


def sequences(tokenizer: Any, chance: random.Random) -> list[int]:
    """Ids of a few kinds, some of them of no token at all."""
    size, kind = len(tokenizer), chance.randrange(4)
    some = chance.sample(range(size + 3), 4)
    if kind == 0 and "\u00f0" in tokenizer.get_vocab() or kind == 0 and "<0xF0>" in tokenizer.get_vocab():
        names = (
            "\u00f0\u0141\u013a\u0122aa"
            if "\u0141" in tokenizer.get_vocab()
            else ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "a"]
        )
        some = [tokenizer.convert_tokens_to_ids(name) for name in names]
        if chance.random() < 0.5:  # whole characters, and where one of them is cut
            return [token for _ in range(9) for token in some[: chance.choice([2, 4, 4, 4, 5])]]
    pool = some if kind < 3 else list(range(size + 3))
    return [chance.choice(pool) for _ in range(chance.randrange(1, 70))]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("keep_special", [False, True])
def test_the_pieces_are_the_text_before_the_first_stop_text(kind: str, keep_special: bool) -> None:
    tokenizer, chance = TOKENIZERS[kind](), random.Random(1)
    stops = cut = 0
    for _ in range(250):
        ids = sequences(tokenizer, chance)
        whole = tokenizer.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)
        stop = [whole[at : at + chance.randrange(1, 6)] for at in chance.choices(range(len(whole) + 1), k=2)]
        stop = chance.choice([[], ["never in it"], [text for text in stop if text]])
        pieces, stopped_by = streamed(tokenizer, ids, stop, keep_special)
        ends = [(whole.index(text) + len(text), whole.index(text), text) for text in stop if text in whole]
        _, until, text = min(ends, default=(0, len(whole), None))
        assert "".join(piece.text for piece in pieces) == whole[:until]
        assert stopped_by == text
        stops += text is not None
        numbers = [token for piece in pieces for token in piece.tokens]
        assert numbers == list(range(len(numbers))), "each token is in one piece, in order"
        assert len(numbers) == len(ids) if text is None else len(numbers) <= len(ids)
        cut += len(pieces) > 3
    assert stops > 30
    assert cut > 50, "it does come in pieces"


def test_text_comes_as_soon_as_it_is_sure() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer, ["ask me"])
    texts = []
    ids = tokenizer("as asked, \u00e9", add_special_tokens=False)["input_ids"]
    for token in ids:
        piece = stream.add(token)
        texts.append(piece.text if piece else None)
    spelt = [tokenizer.decode([token]) for token in ids]
    assert "".join(text or "" for text in texts) == "as asked, \u00e9"
    assert texts[-1] == "\u00e9", "when its second byte is there"
    assert texts[-2] is None
    assert texts.count(None) < len(spelt) - 3


def test_a_piece_has_the_tokens_whose_text_it_completes() -> None:
    tokenizer = llama_like()
    ids = tokenizer.convert_tokens_to_ids(["\u2581a", "<0xC3>", "<0xA9>", "b", "ab", ".", "a", "a"])
    pieces, stopped_by = streamed(tokenizer, ids, ["b.aa"])
    wanted = [("a", [0]), ("\u00e9", [1, 2]), ("ba", [3]), ("", [4])]
    assert [(piece.text, list(piece.tokens)) for piece in pieces] == wanted
    assert stopped_by == "b.aa", "and its own tokens are in no piece; the one that it begins in is"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_costs_the_same_wherever_it_stands(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in ids that are decoded."""
    tokenizer, decoded = TOKENIZERS[kind](), 0
    decode = tokenizer.decode

    def counting(ids: list[int], **options: Any) -> Any:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counting)
    chance = random.Random(2)
    for make in (lambda: chance.randrange(len(tokenizer)), lambda: 8, lambda: 3):
        decoded = 0
        streamed(tokenizer, [make() for _ in range(2000)], ["nothing of it"])
        assert decoded < 20 * 2000


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(tiny_tokenizer(), ["a", ""])
