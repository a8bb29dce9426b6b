"""Thoughts apart from content, however the text is cut."""

import random

import pytest
from tokenizers import AddedToken

from graftlm.data.chat.forms import split_thoughts
from graftlm.data.sources.messages import Message
from graftlm.generation.reasoning import KNOWN_TAGS, ReasoningStream, Split, Tags, reasoning_tags, split_reasoning
from graftlm.testing import tiny_tokenizer

THINK = Tags("<think>", "</think>")

CASES = [
    ("<think>\nfirst\n\nsecond\n</think>\n\nanswer\n", False, ("first\n\nsecond", "answer\n")),
    ("first\nsecond</think>answer", True, ("first\nsecond", "answer")),
    ("<think>it says so itself</think>answer", True, ("it says so itself", "answer")),
    ("no thoughts, <think>not here</think>\n", False, ("", "no thoughts, <think>not here</think>\n")),
    ("  \n<think></think>\n", False, ("", "")),
    ("<think>cut off\n</thin", False, ("cut off\n</thin", "")),
    ("cut off\n\n", True, ("cut off", "")),
    ("<thi", False, ("", "<thi")),
    ("\nplain", False, ("", "\nplain")),
    ("a</think>b</think>c<think>d", True, ("a", "b</think>c<think>d")),
    ("a < b\n\n</ b</think>\n c", True, ("a < b\n\n</ b", " c")),
    ("", False, ("", "")),
    ("", True, ("", "")),
]


@pytest.mark.parametrize(("text", "opened", "wanted"), CASES)
def test_thoughts_and_content_are_the_same_however_the_text_is_cut(
    text: str, opened: bool, wanted: tuple[str, str]
) -> None:
    assert split_reasoning(text, THINK, opened=opened) == wanted
    for seed in range(20):
        chance, at = random.Random(seed), 0
        stream, found = ReasoningStream(THINK, opened=opened), list[Split]()
        while at < len(text):
            size = chance.randrange(1, 7)
            found.append(stream.add(text[at : at + size]))
            at += size
        found.append(stream.close())
        assert ("".join(one.reasoning for one in found), "".join(one.content for one in found)) == wanted


def test_it_is_what_training_splits() -> None:
    for text, opened, _ in CASES:
        row = split_thoughts(Message("assistant", text))
        if row.thinking and row.content.strip() and "<think>" not in text[8:]:
            assert split_reasoning(text, THINK, opened=opened) == (row.thinking, row.content)


def test_text_comes_as_soon_as_it_is_sure() -> None:
    stream = ReasoningStream(THINK)
    given = [stream.add(text) for text in ("<th", "ink>", "a b", " c <", "/", "d</think>", "e")]
    assert given == [("", ""), ("", ""), ("a b", ""), (" c ", ""), ("", ""), ("</d", ""), ("", "e")]


@pytest.mark.parametrize("tags", KNOWN_TAGS)
def test_tags_are_those_of_the_template_or_else_of_the_tokenizer(tags: Tags) -> None:
    tokenizer = tiny_tokenizer()
    assert reasoning_tags(tokenizer.chat_template, tokenizer) is None
    template = f"{{% if '{tags.close}' in content %}}{{% endif %}}"
    assert reasoning_tags(template, tokenizer) == tags
    tokenizer.add_tokens([AddedToken(tag) for tag in tags])
    assert reasoning_tags(None, tokenizer) == tags


def test_a_prompt_that_ends_with_the_open_tag_opens_the_thoughts() -> None:
    assert THINK.opened_by("<|assistant|>\n<think>\n")
    assert not THINK.opened_by("<|assistant|>\n<think>\n\n</think>\n\n")
    assert not THINK.opened_by("What is <think> for?<|assistant|>\n")
