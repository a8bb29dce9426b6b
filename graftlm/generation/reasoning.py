"""What a model thinks before it answers, apart from the answer.

Models write thoughts between two tags at the beginning of an answer; many templates open them in the prompt already.
Line breaks around the thoughts belong to the tags, as in `data.chat.forms.split_thoughts`.
"""

from typing import Any, Literal, NamedTuple

from graftlm.generation.text_stream import may_become


class Tags(NamedTuple):
    open: str
    close: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the text of a prompt opens the thoughts, so that the answer begins with them."""
        return prompt.rstrip().endswith(self.open)


KNOWN_TAGS = (
    Tags("<think>", "</think>"),
    Tags("<thinking>", "</thinking>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("<thought>", "</thought>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
)


def reasoning_tags(template: str | None, tokenizer: Any) -> Tags | None:
    """The tags that a model puts around its thoughts: those of its chat template, else those that are tokens of its
    own; None where it has neither. Tags that are special tokens are in a text that keeps those (`TextStream`)."""
    for tags in KNOWN_TAGS:
        if tags.close in (template or ""):
            return tags
    known = tokenizer.backend_tokenizer.token_to_id
    return next((tags for tags in KNOWN_TAGS if None not in map(known, tags)), None)


class Split(NamedTuple):
    reasoning: str
    content: str


class ReasoningStream:
    """Text of an answer in, thoughts and content out. `opened`: the prompt opens the thoughts.

    Tags that stand within the content are a part of it.
    """

    def __init__(self, tags: Tags, *, opened: bool = False) -> None:
        self._tags, self._opened = tags, opened
        self._state: Literal["begin", "reasoning", "content"] = "begin"
        self._held = ""
        self._blank = True
        """Whether only line breaks came of this part so far."""

    def add(self, text: str) -> Split:
        """What is sure with this text."""
        self._held += text
        if self._state == "begin":
            self._begin(is_last=False)
        reasoning = self._reasoning() if self._state == "reasoning" else ""
        return Split(reasoning, self._content() if self._state == "content" else "")

    def close(self) -> Split:
        """The rest. Thoughts that nothing closed are thoughts."""
        if self._state == "begin":
            self._begin(is_last=True)
        rest, self._held = self._held, ""
        if self._state == "reasoning":
            return Split(self._without_first_breaks(rest).rstrip("\n"), "")
        return Split("", rest)

    def _begin(self, is_last: bool) -> None:
        text = self._held.lstrip()
        if text.startswith(self._tags.open):
            self._state, self._held = "reasoning", text[len(self._tags.open) :]
        elif is_last or not self._tags.open.startswith(text):
            self._state = "reasoning" if self._opened else "content"
            self._blank = self._opened  # a content without thoughts is as it is

    def _reasoning(self) -> str:
        before, close, after = self._held.partition(self._tags.close)
        if close:
            found = self._without_first_breaks(before).rstrip("\n")
            self._state, self._held, self._blank = "content", after, True
            return found
        sure = self._held[: len(self._held) - may_become(self._held, [self._tags.close])].rstrip("\n")
        self._held = self._held[len(sure) :]
        return self._without_first_breaks(sure)

    def _content(self) -> str:
        text, self._held = self._held, ""
        return self._without_first_breaks(text)

    def _without_first_breaks(self, text: str) -> str:
        text = text.lstrip("\n") if self._blank else text
        self._blank = self._blank and not text
        return text


def split_reasoning(text: str, tags: Tags, *, opened: bool = False) -> Split:
    """The thoughts and the content of a whole answer."""
    stream = ReasoningStream(tags, opened=opened)
    first, last = stream.add(text), stream.close()
    return Split(first.reasoning + last.reasoning, first.content + last.content)
