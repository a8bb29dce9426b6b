"""Tasks that rewrite a few words."""

from random import Random
from string import ascii_lowercase

from graftlm.data.sources.tasks.task import Task
from graftlm.data.sources.tasks.words import LABELS, NOUNS


def reverse_words(draw: Random) -> tuple[str, str]:
    words = draw.sample(NOUNS, 3)
    return " ".join(words), " ".join(reversed(words))


def sort_words(draw: Random) -> tuple[str, str]:
    words = draw.sample(NOUNS, 3)
    return ", ".join(words), ", ".join(sorted(words))


def snake_case(draw: Random) -> tuple[str, str]:
    words = draw.sample(LABELS, 3)
    return " ".join(words).title(), "_".join(words)


def camel_case(draw: Random) -> tuple[str, str]:
    words = draw.sample(LABELS, 3)
    return " ".join(words), words[0] + "".join(word.capitalize() for word in words[1:])


def shift_letters(draw: Random) -> tuple[str, str]:
    """Caesar's cipher with a shift of one; letters stand apart, so that each is a token."""
    letters = draw.choices(ascii_lowercase, k=3)
    shifted = [ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26] for letter in letters]
    return " ".join(letters), " ".join(shifted)


TASKS = {
    "reverse-words": Task(
        (
            ("Reverse", "Turn around", "Invert", "Flip"),
            ("the order of the words", "the word order", "the sequence of the words", "the words' order"),
            ("in this line", "below", "in this text", "given here"),
        ),
        reverse_words,
    ),
    "sort-words": Task(
        (
            ("Sort", "Order", "Arrange", "Put in order"),
            ("these words", "the words", "the following words", "the items of this list"),
            ("alphabetically", "from A to Z", "in alphabetical order", "by the alphabet"),
        ),
        sort_words,
    ),
    "snake-case": Task(
        (
            ("Write", "Convert", "Rewrite", "Turn"),
            ("this name", "the title", "this heading", "the label"),
            ("in snake case", "as a snake_case name", "in snake_case", "as a Python variable"),
        ),
        snake_case,
    ),
    "camel-case": Task(
        (
            ("Write", "Convert", "Rewrite", "Turn"),
            ("these words", "this name", "the phrase", "the label"),
            ("in camel case", "as a camelCase name", "in camelCase", "as a Java variable"),
        ),
        camel_case,
    ),
    "shift-letters": Task(
        (
            ("Replace", "Exchange", "Substitute", "Swap"),
            ("each letter", "every letter", "all letters", "the letters"),
            ("by the next of the alphabet", "with the one after it", "by its successor", "with the following letter"),
        ),
        shift_letters,
    ),
}
