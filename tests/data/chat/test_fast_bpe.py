"""Word by word, the ids are those of the tokenizer, whatever the text; where that is not certain, it is asked."""

import random
import string
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tokenizers.trainers import BpeTrainer

from graftlm.data.chat import fast_bpe
from graftlm.data.chat.fast_bpe import GPT2, KNOWN, BpeWords, ascii_only

pytestmark = pytest.mark.versions

TEXT = [
    "It's what they'll say: don't, I'M, we'VE.",
    "x = [1, 23, 456, 7890]\n\n    return  x\t# no\r\n",
    "  a   b \n c",
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|im", "<think>"]


def trained(pre_tokenizer: Any, *, normaliser: Any = None, added: list[Any] | None = None) -> Tokenizer:
    """A BPE with a hundred merges, so that tokens of several characters and of parts of characters are there."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*TEXT, string.printable, "the answer is there and then"] * 3, trainer)
    tokens = [AddedToken(text, special=True, normalized=False) for text in CONTROL] if added is None else added
    tokenizer.add_tokens(tokens)
    return tokenizer


def splitting(pattern: str) -> Any:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {"byte-level": ByteLevel(add_prefix_space=False), **{p[:9] + p[-60:-52]: splitting(p) for p in KNOWN}}
PIECES = [
    *string.ascii_letters,
    *string.digits,
    *string.punctuation,
    *" \t\n\r\x0b\x0c\x00\x1c\x1d\x1e\x1f\x7f",
    *CONTROL,
]
PIECES += ["'s", "'LL", "  ", " \n", "\r\n", "\n\n", "   ", "don't", "12345", "<|", "|>", "a b", "\t\t"]


def random_text(draw: random.Random) -> str:
    kinds = draw.choice((PIECES, list(" \t\n\r\x0b\x0c"), list("' stredlm"), CONTROL + list(" a\n"), list("0123 a.")))
    return "".join(draw.choice(kinds) for _ in range(draw.randint(0, 40)))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_end_where_the_tokenizer_ends_them(name: str) -> None:
    """The cut alone, of any ASCII text, against the tokenizer's own."""
    pre_tokenizer, pattern = PRE_TOKENIZERS[name], dict(zip(PRE_TOKENIZERS, (GPT2, *KNOWN), strict=True))[name]
    find = fast_bpe.re.compile(ascii_only(pattern), fast_bpe.re.ASCII).findall
    draw = random.Random(0)
    every = [chr(a) + chr(b) + c for a in range(128) for b in range(128) for c in (" ", "x", "")]
    for text in [*every, *(random_text(draw) for _ in range(4_000))]:
        places = [offsets for _, offsets in pre_tokenizer.pre_tokenize_str(text)]
        assert find(text) == [text[a:b] for a, b in places], repr(text)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_and_offsets_are_those_of_the_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained(PRE_TOKENIZERS[name], normaliser=normalizers.NFC() if name != "byte-level" else None)
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    found = BpeWords.of(tokenizer)
    assert found is not None
    draw = random.Random(1)
    for text in [*TEXT, "", *CONTROL, *(random_text(draw) for _ in range(3_000))]:
        encoded = found.encode(text)
        wanted = tokenizer.encode(text, add_special_tokens=False)
        assert encoded is not None, repr(text)
        ids, starts, ends = encoded
        assert ids.tolist() == wanted.ids, repr(text)
        assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == wanted.offsets, repr(text)
        ids[:] = 0  # an array of its own, which torch may have as it is


def test_other_text_goes_to_the_tokenizer() -> None:
    found = BpeWords.of(trained(ByteLevel(add_prefix_space=False)))
    assert found is not None
    assert found.encode("caf\u00e9") is None


@pytest.mark.parametrize(
    "tokenizer",
    [
        trained(ByteLevel(add_prefix_space=True)),
        trained(Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
        trained(splitting(r"\p{L}+|\s+|.")),
        trained(ByteLevel(add_prefix_space=False), normaliser=normalizers.Lowercase()),
        trained(ByteLevel(add_prefix_space=False), added=[AddedToken("<x>", rstrip=True, normalized=False)]),
        trained(ByteLevel(add_prefix_space=False), added=[AddedToken("<x>", normalized=True)]),
    ],
    ids=["prefix space", "digits", "another expression", "lower case", "token that strips", "normalised token"],
)
def test_tokenizers_that_do_more_are_left_alone(tokenizer: Tokenizer) -> None:
    assert BpeWords.of(tokenizer) is None


def test_a_tokenizer_without_added_tokens_is_not_cut_everywhere() -> None:
    tokenizer = trained(ByteLevel(add_prefix_space=False), added=[])
    found = BpeWords.of(tokenizer)
    assert found is not None
    encoded = found.encode("the answer")
    assert encoded is not None
    assert encoded[0].tolist() == tokenizer.encode("the answer").ids


def test_a_difference_stops_everything() -> None:
    """A table that is wrong, as it would be for a tokenizer that changed under us."""
    tokenizer = trained(ByteLevel(add_prefix_space=False))
    found = BpeWords.of(tokenizer)
    assert found is not None
    a, b = tokenizer.encode("a").ids, tokenizer.encode("b").ids
    found._known["a"] = np.array(b, np.int32).tobytes()
    assert a != b
    with pytest.raises(AssertionError, match="other ids"):
        found.encode("a")  # the first text goes both ways


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bpe, "MOST", 50)
    tokenizer = trained(ByteLevel(add_prefix_space=False))
    found = BpeWords.of(tokenizer)
    assert found is not None
    for number in range(500):
        encoded = found.encode(f"word{number} and{number}")
        assert encoded is not None
        assert encoded[0].tolist() == tokenizer.encode(f"word{number} and{number}").ids
        assert len(found._known) < 60
        assert len(found._older) < 60
