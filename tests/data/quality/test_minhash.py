"""MinHash against sets of words compared one by one, and shared phrases against a plain search."""

import random

import numpy as np
import pytest

from graftlm.data.quality import minhash
from graftlm.data.quality.minhash import WordNumbers, grams, near_duplicates, resemblance, shared_phrases


def text(draw: random.Random, count: int, vocabulary: int = 5_000) -> list[str]:
    return [f"w{draw.randrange(vocabulary)}" for _ in range(count)]


def changed(draw: random.Random, words: list[str], share: float) -> list[str]:
    return [f"x{draw.randrange(10**9)}" if draw.random() < share else word for word in words]


def plain(words: list[str], count: int) -> set[tuple[str, ...]]:
    count = min(count, len(words))
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}


def jaccard(a: list[str], b: list[str], count: int = 5) -> float:
    one, other = plain(a, count), plain(b, count)
    return len(one & other) / len(one | other)


def sets(texts: list[list[str]], count: int) -> list[minhash.Grams]:
    words = WordNumbers()
    return [grams(words.of(" ".join(words_)), count) for words_ in texts]


@pytest.mark.parametrize("seed", range(5))
def test_resemblance_is_that_of_the_sets_of_five_words(seed: int) -> None:
    draw = random.Random(seed)
    one = text(draw, 60, vocabulary=30)
    other = changed(draw, one, 0.1) + text(draw, 10)
    a, b = sets([one, other], 5)
    assert len(a) == len(plain(one, 5))
    assert resemblance(a, b) == pytest.approx(jaccard(one, other))
    assert resemblance(a, a) == 1


def test_words_are_of_any_script_and_case_and_punctuation_do_not_count() -> None:
    words = WordNumbers()
    assert words.of("Wo IST, mein Paket?!").tolist() == words.of("wo ist mein paket").tolist()
    assert len(words.of("\u6211\u7684\u5305\u88f9 is lost")) == 4 + 2
    assert len(words.of("na\u00efve caf\u00e9 x_y")) == 4
    assert len(words.of(" ... !")) == 0


def test_a_text_shorter_than_a_phrase_is_a_phrase_of_its_own() -> None:
    a, b, c, none = sets([["yes"], ["yes"], ["yes", "no"], []], 5)
    assert resemblance(a, b) == 1
    assert resemblance(a, c) == 0
    assert len(none) == 0
    assert resemblance(none, none) == 0


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    draw = random.Random(0)
    texts = [text(draw, draw.randint(20, 200)) for _ in range(400)]
    planted = []
    for number in range(60):
        words = texts[number]
        while jaccard(words, texts[number]) == 1:
            words = changed(draw, texts[number], 0.015)
        if jaccard(words, texts[number]) >= minhash.LEAST:
            planted.append((number, len(texts)))
            texts.append(words)
    half = [w for number in range(100, 150) for w in [texts[number][:10] + text(draw, 100)]]
    texts += half
    found = near_duplicates(sets(texts, 5))
    assert len(planted) > 30
    assert sorted((a, b) for a, b, _ in found) == planted
    for a, b, alike in found:
        assert alike == pytest.approx(jaccard(texts[a], texts[b]))


def test_a_whole_family_is_connected() -> None:
    draw = random.Random(1)
    first = text(draw, 300)
    family = [first, *(changed(draw, first, 0.004) for _ in range(30))]
    found = near_duplicates(sets(family + [text(draw, 300) for _ in range(20)], 5))
    assert len(found) == 30
    reached = {0}
    for a, b, _ in sorted(found):
        assert a < b <= 30
        reached |= {a, b} if {a, b} & reached else set()
    assert reached == set(range(31))


def test_the_estimate_is_that_of_broder() -> None:
    """The share of equal least elements is J, within four standard deviations."""
    draw = random.Random(2)
    one = text(draw, 2_000 // 4)
    for share in (0.01, 0.03, 0.1):
        pair = sets([one, changed(draw, one, share)], 5)
        signatures = minhash._signatures(pair)
        j = resemblance(*pair)
        spread = (j * (1 - j) / signatures.shape[1]) ** 0.5
        assert abs(float((signatures[0] == signatures[1]).mean()) - j) < 4 * spread


def test_no_texts_and_empty_texts_have_no_duplicates() -> None:
    assert near_duplicates([]) == []
    assert near_duplicates(sets([[], [], ["a"]], 5)) == []


def test_the_same_texts_give_the_same_answer() -> None:
    draw = random.Random(3)
    texts = [text(draw, 30, vocabulary=9) for _ in range(50)]
    assert near_duplicates(sets(texts, 5)) == near_duplicates(sets(texts, 5))


@pytest.mark.parametrize("seed", range(4))
def test_shared_phrases_are_those_of_a_plain_search(seed: int) -> None:
    draw = random.Random(seed)
    held = [text(draw, draw.randint(5, 60)) for _ in range(20)]
    trained = [text(draw, draw.randint(5, 60)) for _ in range(50)]
    for number in range(0, 50, 3):
        source = held[draw.randrange(20)]
        start = draw.randrange(len(source))
        trained[number] += source[start : start + draw.randint(5, 40)]
    wanted = {}
    for number, words in enumerate(trained):
        common = [len(plain(words, 13) & plain(other, 13)) for other in held]
        if max(common):
            best = common.index(max(common))
            wanted[number] = best, pytest.approx(max(common) / len(plain(held[best], 13)))
    every = sets(trained + held, 13)
    found = {s.trained: (s.held_out, s.share) for s in shared_phrases(iter(every[:50]), every[50:])}
    assert len(wanted) >= 3
    assert found == wanted


def test_a_phrase_that_many_rows_have_is_boilerplate() -> None:
    draw = random.Random(5)
    question = text(draw, 20)
    held = [question + text(draw, 20)]
    for count, wanted in ((minhash.COMMON, minhash.COMMON), (minhash.COMMON + 1, 0)):
        trained = [question + text(draw, 20) for _ in range(count)]
        every = sets(trained + held, 13)
        assert len(shared_phrases(every[:count], every[count:])) == wanted
    assert shared_phrases(every, []) == []


def test_a_long_text_is_looked_at_up_to_a_limit() -> None:
    draw = random.Random(6)
    words = WordNumbers().of(" ".join(text(draw, 3 * minhash.MOST_WORDS)))
    assert len(words) == minhash.MOST_WORDS
    assert words.dtype == np.uint64
