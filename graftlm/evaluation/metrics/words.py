r"""How metrics cut texts into words, and Porter's stems of English words.

    squad_words   lower case, without ASCII punctuation and the articles a, an, the (Rajpurkar et al. 2016,
                  arXiv:1606.05250, section 6.1), cut at white space
    tokens        lower case, runs of letters and digits, and each other character that is no white space by itself

Porter (1980), "An algorithm for suffix stripping": the algorithm as published. m counts the pairs of a run of vowels
and a run of consonants in a stem: [C](VC)^m[V].
"""

import re
import string
from functools import lru_cache
from itertools import pairwise

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_text(text: str) -> str:
    """A text as SQuAD's script compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(words: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + order]) for at in range(len(words) - order + 1)]


# Porter's stems ------------------------------------------------------------------------------------------------------

STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


@lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """The stem of an English word in lower case."""
    word = _step_1(word)
    for table in (STEP_2, STEP_3):
        if (suffix := _longest(word, table)) and _m(word[: -len(suffix)]) > 0:
            word = word[: -len(suffix)] + table[suffix]
    if suffix := _longest(word, STEP_4):
        left = word[: -len(suffix)]
        if _m(left) > 1 and (suffix != "ion" or left.endswith(("s", "t"))):
            word = left
    if word.endswith("e") and (_m(word[:-1]) > 1 or (_m(word[:-1]) == 1 and not _ends_cvc(word[:-1]))):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _m(word[:-1]) > 1 else word


def _step_1(word: str) -> str:
    """Plurals, past and progressive forms, y after a vowel."""
    for suffix, by in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(suffix):
            word = word[: -len(suffix)] + by
            break
    if word.endswith("eed"):
        word = word[:-1] if _m(word[:-3]) > 0 else word
    else:
        for suffix in ("ed", "ing"):
            left = word[: -len(suffix)]
            if word.endswith(suffix):
                if _has_vowel(left):
                    word = _restored(left)
                break
    return word[:-1] + "i" if word.endswith("y") and _has_vowel(word[:-1]) else word


def _restored(word: str) -> str:
    """A stem that -ed or -ing was taken from: hoping -> hop -> hope, hopping -> hopp -> hop."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) > 1 and word[-1] == word[-2] and _is_consonant(word, len(word) - 1) and word[-1] not in "lsz":
        return word[:-1]
    return word + "e" if _m(word) == 1 and _ends_cvc(word) else word


def _longest(word: str, suffixes: "dict[str, str] | tuple[str, ...]") -> str | None:
    return max((suffix for suffix in suffixes if word.endswith(suffix)), key=len, default=None)


def _is_consonant(word: str, at: int) -> bool:
    if word[at] == "y":
        return at == 0 or not _is_consonant(word, at - 1)
    return word[at] not in "aeiou"


def _m(word: str) -> int:
    kinds = [_is_consonant(word, at) for at in range(len(word))]
    return sum(consonant and not before for before, consonant in pairwise(kinds))


def _has_vowel(word: str) -> bool:
    return not all(_is_consonant(word, at) for at in range(len(word)))


def _ends_cvc(word: str) -> bool:
    """Whether it ends with consonant, vowel, consonant, and the last is none of w, x, y."""
    end = len(word)
    return (
        end > 2
        and _is_consonant(word, end - 1)
        and not _is_consonant(word, end - 2)
        and _is_consonant(word, end - 3)
        and word[-1] not in "wxy"
    )
