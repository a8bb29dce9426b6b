"""Every chat template that TRL ships, on conversations of many kinds: what is trained of an answer is what generation
would have to write after its prompt.

The truth is transformers' own rendering. Of an answer it is the text behind the prompt of generation, up to the token
that ends the turn. A template takes a conversation in one of several forms (arguments of calls as a mapping or a text,
content null or empty, a text or a list of parts), and any that loses nothing will do. Where a template begins an answer
otherwise than it writes it, there is no such text: then the prompt must be that of generation, and the answer must be
what the template writes of it, behind the end of the thoughts that the prompt opens.
"""

import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

from graftlm.data.chat.masks import weights
from graftlm.data.chat.render import Renderer
from graftlm.data.sources.formats import FORMATS, check
from graftlm.errors import DataError
from graftlm.testing import tiny_tokenizer
from tests.cases.test_masks_and_templates import assistant, user

CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|<\|[a-z_]{2,20}>|<[a-z_]{2,20}\|>|\[/?[A-Z_]{2,20}\]"
    r"|</?(?:start|end)_of_[a-z]+>|<(?:bos|eos|s|/s|BOS_TOKEN|EOS_TOKEN|end_of_utterance)>"
)
"""What templates write as control tokens."""
TAGS = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")
"""Added tokens that models have for these and that are not called special."""
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": {
        "type": "object", "properties": {key: {"type": "string", "description": f"the {key}"}}, "required": [key]}}}
    for name, key in (("get_weather", "city"), ("find_parcel", "number"))
]  # fmt: skip
IDS = ("abcdef001", "abcdef002")


def calls(*each: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": own, "type": "function", "function": {"name": name, "arguments": arguments}}
        for own, (name, arguments) in zip(IDS, each, strict=False)
    ]


def result(content: str, number: int = 0, name: str = "get_weather") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": IDS[number], "name": name}


ROME, OSLO, PARCEL = (
    ("get_weather", {"city": "Rome"}),
    ("get_weather", {"city": "Oslo"}),
    ("find_parcel", {"number": 7}),
)
ONE, SAYS = assistant(None, tool_calls=calls(ROME)), assistant("It is 21 degrees.")
FOUR = assistant("It is 4.", reasoning_content="Two and two.")
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Where is it?"), assistant("In the van.")],
    "system": [SYSTEM, user("Where is it?"), assistant("In the van."), user("And now?"), assistant("At the door.")],
    "three turns": [user("1?"), assistant("Uno."), user("2?"), assistant("Dos."), user("3?"), assistant("Tres.")],
    "white space": [user("Code?\n"), assistant("def f():\n    return 1\n"), user("More?"), assistant("\n  indented")],
    "a call": [user("Rome?"), ONE, result("21"), SAYS, user("Thanks."), assistant("Welcome.")],
    "a call and a system message": [SYSTEM, user("Rome?"), ONE, result("21"), SAYS],
    "two calls": [
        *(user("Rome, and my parcel?"), assistant(None, tool_calls=calls(ROME, PARCEL))),
        *(result("21"), result("van", 1, "find_parcel"), assistant("21 degrees, in the van.")),
    ],
    "two calls of one function": [
        *(user("Rome and Oslo?"), assistant(None, tool_calls=calls(ROME, OSLO))),
        *(result("21"), result("3", 1), assistant("21 and 3.")),
    ],
    "a text and a call": [user("Rome?"), assistant("Let me look.", tool_calls=calls(ROME)), result("21"), SAYS],
    "a text that names its call": [
        *(user("Rome?"), assistant("I use get_weather.", tool_calls=calls(ROME)), result("21"), SAYS)
    ],
    "thoughts": [user("2+2?"), FOUR],
    "thoughts in turns": [user("2+2?"), FOUR, user("3+3?"), assistant("It is 6.", reasoning_content="Thrice two.")],
    "thoughts and a call": [
        *(user("Rome?"), {**ONE, "reasoning_content": "I need the weather."}, result("21")),
        {**SAYS, "reasoning_content": "Easy now."},
    ],
    "thoughts in the text": [user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\nIt is 4.")],
}  # fmt: skip


def shipped() -> list[Path]:
    found = importlib.util.find_spec("trl")
    return sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja")) if found and found.origin else []


def tokenizer_of(source: str) -> Any:
    """A tokenizer whose control tokens are those that the template writes, and whose end of text is what the template
    writes behind an answer."""
    tokenizer = tiny_tokenizer(source)
    controls = sorted({*CONTROL.findall(source)} - {*tokenizer.all_special_tokens})
    tokenizer.add_special_tokens({"additional_special_tokens": controls})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in sorted({*TAGS.findall(source)})])
    for form in forms([user("a"), assistant("zebra")]):
        try:
            text = rendered(tokenizer, form, [], answer_next=False)
        except Exception:  # noqa: S112 (the template takes another form)
            continue
        if ends := re.match(rf"\s*((?:{CONTROL.pattern})+)", text.rpartition("zebra")[2]):
            tokenizer.eos_token = CONTROL.findall(ends[1])[-1]
        break
    return tokenizer


def rendered(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any], *, answer_next: bool) -> str:
    """What transformers renders, without the step before that takes away null content."""
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    (text,), _ = render_jinja_template(
        [messages],
        tools or None,
        chat_template=tokenizer.chat_template,
        add_generation_prompt=answer_next,
        **names,
    )
    return str(text)


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The forms in which a conversation may be handed over, thoughts under all names that templates have for them."""
    apart = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", str(messages[-1]["content"]))
    split = [{**messages[-1], "content": apart[2], "reasoning_content": apart[1]}] if apart else []
    for turns in [messages, *([[*messages[:-1], *split]] if split else [])]:
        calling = any("tool_calls" in message for message in turns)
        choices = ((None, ""), (False, True)) if calling else ((None,), (False,))
        for empty, as_text, parts in itertools.product(*choices, (False, True)):
            yield [_in_form(json.loads(json.dumps(message)), empty, as_text, parts) for message in turns]


def _in_form(message: dict[str, Any], empty: str | None, as_text: bool, parts: bool) -> dict[str, Any]:
    for each in message.get("tool_calls", []) if as_text else []:
        each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    if message["content"] is None:
        message["content"] = empty
    if parts and isinstance(message["content"], str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    if thoughts := message.get("reasoning_content"):
        message |= {"thinking": thoughts, "reasoning": thoughts}
    return message


def needed(message: dict[str, Any]) -> list[str]:
    """What the rendering of an answer must hold, beside its thoughts."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    found = [part for f in functions for part in (f["name"], *map(str, f["arguments"].values()))]
    text = re.sub(r"(?s)^<think>.*</think>", "", message["content"] or "").strip()
    return [*found, *([text] if text else [])]


def cut(text: str, message: dict[str, Any], eos: str) -> str:
    """A text that begins with an answer, up to what ends the answer; all of it where no control token follows."""
    last = max(text.rfind(part) + len(part) for part in needed(message))
    controls = list(CONTROL.finditer(text, last))
    if not controls:
        return text
    if message.get("tool_calls"):  # templates write calls with control tokens too
        ends = [control for control in controls if control[0] == eos]
        return text[: (ends or controls)[-1].end()]
    run = controls[:1]
    for control in controls[1:]:
        if control.start() != run[-1].end() or run[-1][0] == eos:
            break
        run.append(control)
    return text[: (run[-1] if run[-1][0] == eos else run[0]).end()]


def trained(renderer: Renderer, messages: list[dict[str, Any]], tools: list[Any]) -> dict[int, tuple[str, str]]:
    """Of each answer, by its number: (the text before what is trained of it, the text that is trained)."""
    conversation = FORMATS["messages"](
        json.loads(json.dumps({"messages": messages} | ({"tools": tools} if tools else {})))
    )
    check(conversation.messages)
    found: dict[int, tuple[str, str]] = {}
    for piece in renderer.rows(conversation.messages, conversation.tools):
        weight = weights(piece, "response")
        assert set(weight.tolist()) <= {0, 1}
        for index in sorted({*piece.turns[weight > 0].tolist()}):
            places = np.flatnonzero((weight > 0) & (piece.turns == index))
            assert (np.diff(places) == 1).all(), "one run of tokens"
            assert index not in found, "each answer is trained once"
            before, own = piece.ids[: places[0]].tolist(), piece.ids[places].tolist()
            prompt = renderer.prompt(conversation.messages[:index], conversation.tools)
            assert before == prompt.tolist(), "what is trained follows the prompt of generation, token by token"
            found[index] = (_text(renderer, before), _text(renderer, own))
    return found


def _text(renderer: Renderer, ids: list[int]) -> str:
    return str(renderer.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def truth(tokenizer: Any, form: list[dict[str, Any]], messages: list[dict[str, Any]], tools: list[Any]) -> Any:
    """[(prompt, whole rendering, whether it goes on where the prompt ends, whether thoughts are in it)] of each answer
    in this form; None where the template refuses it or does not write all."""
    found = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = rendered(tokenizer, form[:index], tools, answer_next=True)
            whole = rendered(tokenizer, form[: index + 1], tools, answer_next=False)
        except Exception:
            return None
        own = whole[len(os.path.commonprefix([prompt, whole])) :]
        if any(part not in own for part in needed(message)):
            return None
        thoughts = form[index].get("reasoning_content")
        found.append((prompt, whole, whole.startswith(prompt), thoughts is None or thoughts in own))
    return found


def agrees(expected: Any, found: dict[int, tuple[str, str]], messages: list[dict[str, Any]], eos: str) -> bool:
    """Whether what is trained is what this form says."""
    for (index, (before, own)), (prompt, whole, goes_on, _) in zip(found.items(), expected, strict=True):
        message = messages[index]
        if before != prompt:
            return False
        if goes_on:
            if own != cut(whole[len(prompt) :], message, eos):
                return False
            continue
        answer = cut(whole, message, eos).rstrip()
        body = own.rpartition("</think>")[2].strip()  # behind the thoughts that the prompt opened
        if not answer.endswith(body) or any(part not in body for part in needed(message)):
            return False
        head = answer.removesuffix(body)
        rest = re.sub(r"\s|</?think>", "", head[len(os.path.commonprefix([prompt, head])) :])
        if rest not in ("", re.sub(r"\s", "", message.get("reasoning_content", ""))):
            return False  # the answer begins before what is trained of it
    return True


@pytest.mark.sampled
@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in shipped()])
def test_what_is_trained_is_what_generation_has_to_write(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    tokenizer = tokenizer_of(source)
    renderer = Renderer(tokenizer)
    for name, messages in CONVERSATIONS.items():
        tools = TOOLS if any("tool_calls" in message for message in messages) else []
        answers = sum(message["role"] == "assistant" for message in messages)
        known = [expected for form in forms(messages) if (expected := truth(tokenizer, form, messages, tools))]
        try:
            found = trained(renderer, messages, tools)
        except DataError as error:
            if any(all(goes_on for _, _, goes_on, _ in expected) for expected in known):
                pytest.fail(f"{name}: refused, though a form can be rendered: {error}")
            continue
        assert len(found) == answers, name
        whole = [expected for expected in known if all(thoughts for *_, thoughts in expected)]
        assert any(agrees(expected, found, messages, str(tokenizer.eos_token)) for expected in whole or known), (
            name,
            found,
        )


def test_the_templates_are_there() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed, which brings the templates")
    assert len(shipped()) > 60
