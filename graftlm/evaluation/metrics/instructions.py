r"""Instructions that a program can verify, by the names and arguments of IFEval (Zhou et al. 2023, arXiv:2311.07911,
table 1), and the kinds of CoDI-Eval that need no classifier (Chen et al. 2024, arXiv:2401.00690): keywords and length.

    INSTRUCTIONS[name](answer, **arguments) -> whether the answer follows it

Verifiers are our own. Where they depart from lm-eval 0.4.13's, which needs downloads of NLTK and langdetect:
- sentences end at . ! ? or three dots before white space, other than after an initial or an abbreviation; there: Punkt
- english_capital and english_lowercase look at case alone; there: the language must be detected as English too
- capital_word_frequency counts words of letters, with hyphens, apostrophes and dots inside; there: NLTK's tokens
- words to be found are texts; there: regular expressions
- language:response_language needs a classifier and is refused

codi:* are ours: the paper checks keywords as parts of the text, and words of English by white space (not checked
against its code).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graftlm.errors import DataError, nearest

Verifier = Callable[..., bool]

_SHORT = "mr mrs ms dr prof st jr sr vs etc e.g i.e inc ltd co no fig al"
ABBREVIATIONS = frozenset(_SHORT.split())
PARAGRAPH = re.compile(r"\s?\*\*\*\s?")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""What `constrained_response` allows."""


def compare(count: int, relation: str | None, wanted: int) -> bool:
    """`less than` or `at least`, as in IFEval; `at most` and `exactly` are ours."""
    known = {
        "less than": count < wanted,
        "at least": count >= wanted,
        "at most": count <= wanted,
        "exactly": count == wanted,
    }
    if relation not in known:
        raise ValueError(f"relation {relation!r}. {nearest(str(relation), known)}")
    return known[relation]


def has(word: str, text: str) -> int:
    """How often a text holds a word or a part of one, in any case."""
    return len(re.findall(re.escape(word.strip()), text, re.IGNORECASE))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    pieces, begin = [], 0
    for end in re.finditer(r"[.!?]+[\"')\]\u201d\u2019]*(?=\s|$)", text):
        last = re.search(r"[\w.]*$", text[begin : end.start()])
        word = last.group().lower() if last else ""
        if end.group() == "." and (word in ABBREVIATIONS or re.fullmatch(r"(?:[a-z]\.)*[a-z]", word)):
            continue
        pieces.append(text[begin : end.end()].strip())
        begin = end.end()
    return [piece for piece in [*pieces, text[begin:].strip()] if piece]


# Keywords ------------------------------------------------------------------------------------------------------------


def existence(answer: str, *, keywords: Sequence[str]) -> bool:
    return all(has(word, answer) for word in keywords)


def frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return compare(has(keyword, answer), relation, frequency)


def forbidden_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(Counter(answer.lower())[letter.lower()], let_relation, let_frequency)


# Length --------------------------------------------------------------------------------------------------------------


def number_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return compare(len(sentences(answer)), relation, num_sentences)


def number_words(answer: str, *, num_words: int, relation: str) -> bool:
    return compare(len(words(answer)), relation, num_words)


def number_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ***; an empty one may only be the first or the last."""
    pieces = [piece.strip() for piece in PARAGRAPH.split(answer)]
    return all(pieces[1:-1]) and len([piece for piece in pieces if piece]) == num_paragraphs


def nth_paragraph_first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by two new lines."""
    pieces = [piece.strip() for piece in answer.split("\n\n")]
    count = len([piece for piece in pieces if piece])
    if not 1 <= nth_paragraph <= count or not pieces[nth_paragraph - 1]:
        return False
    first = pieces[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split("[.,?!'\"]", first)[0].lower() == first_word.lower()


# Content and format --------------------------------------------------------------------------------------------------


def number_placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def postscript(answer: str, *, postscript_marker: str) -> bool:
    forms = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    form = forms.get(postscript_marker.strip(), re.escape(postscript_marker.strip().lower()))
    return re.search(form, answer.lower()) is not None


def number_bullet_lists(answer: str, *, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", answer, re.MULTILINE)) == num_bullets


def constrained_response(answer: str) -> bool:
    return any(option in answer for option in OPTIONS)


def number_highlighted_sections(answer: str, *, num_highlights: int) -> bool:
    """*one star* or **two**; as in IFEval's code, two stars can count twice."""
    one, two = re.findall(r"\*[^\n*]*\*", answer), re.findall(r"\*\*[^\n*]*\*\*", answer)
    return len([each for each in [*one, *two] if each.strip("*").strip()]) >= num_highlights


def multiple_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", answer)) >= num_sections


def json_format(answer: str) -> bool:
    """JSON, or JSON in a fence of three backticks."""
    text = re.sub(r"^```(?:json)?", "", answer.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(answer: str) -> bool:
    return any(each.lstrip("<").rstrip(">").strip() for each in re.findall(r"<<[^\n]+>>", answer))


# Combination, begin and end, case, punctuation -----------------------------------------------------------------------


def two_responses(answer: str) -> bool:
    """Two that differ, divided by ******."""
    pieces = [piece.strip() for piece in answer.split("******")]
    given = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    found = [word for word in re.findall(r"[^\W_]+(?:[-'.\u2019][^\W_]+)*", answer) if word.isupper()]
    return compare(len(found), capital_relation, capital_frequency)


def english_capital(answer: str) -> bool:
    return answer.isupper()


def english_lowercase(answer: str) -> bool:
    return answer.islower()


def no_comma(answer: str) -> bool:
    return "," not in answer


# CoDI-Eval -----------------------------------------------------------------------------------------------------------


def codi_keyword(answer: str, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> bool:
    return all(has(word, answer) for word in include) and not any(has(word, answer) for word in exclude)


def codi_length(
    answer: str, *, equal: int | None = None, at_least: int | None = None, at_most: int | None = None
) -> bool:
    """In words that white space divides. Several bounds may be given: a range has both."""
    count = len(answer.split())
    low = equal if equal is not None else at_least
    high = equal if equal is not None else at_most
    if low is None and high is None:
        raise ValueError("a length needs `equal`, `at_least` or `at_most`")
    return (low is None or count >= low) and (high is None or count <= high)


INSTRUCTIONS: dict[str, Verifier] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "codi:keyword": codi_keyword,
    "codi:length": codi_length,
}


def follows(name: str, answer: str, arguments: Mapping[str, Any], where: str = "") -> bool:
    """Whether an answer follows an instruction. DataError for one that is not known, or with other arguments."""
    if name not in INSTRUCTIONS:
        raise DataError(
            f"{where}: no verifier for the instruction {name!r}. {nearest(name, INSTRUCTIONS)}",
            code="no-such-instruction",
        )
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return INSTRUCTIONS[name](answer, **given)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: the instruction {name!r} cannot be verified with the arguments {json.dumps(given)[:200]}: "
            f"{error}",
            code="invalid-instruction",
        ) from None
