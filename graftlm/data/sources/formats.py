"""FORMATS: row -> conversation. A format is a function from a dict, as it stands in the file, to a Conversation.

The keys of its first rows decide the format of a file, which the report names; `data.format` overrides it. All formats
read and refuse the same: `messages.py` reads single turns, `check` here looks at the whole.
"""

import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from graftlm.data.sources.fields import read_all
from graftlm.data.sources.messages import (
    ROLES,
    SHAREGPT_ROLES,
    TEXT,
    Fields,
    Message,
    RowError,
    from_json,
    listed,
    missing,
    read_messages,
    read_text,
    read_tools,
)

__all__ = ["FORMATS", "ROLES", "SHAREGPT_ROLES", "TEXT", "Conversation", "Fields", "Message", "RowError", "check"]


@dataclass(frozen=True)
class Conversation:
    """The contents of a row, the same type for every format."""

    messages: list[Message]
    tools: tuple[dict[str, object], ...] = ()
    """What an assistant could call: functions with a JSON schema, as OpenAI has them."""
    rejected: tuple[list[Message], ...] = ()
    """Whole conversations that were liked less than `messages`, the best of them first; a pair has one."""
    desirable: bool | None = None
    """Feedback without a pair: whether the answer was liked. None where the row does not say."""
    asks: bool = False
    """Whether it may end without an answer, because the model is to give it."""


# Conversations -----------------------------------------------------------------------------------------------------


def messages(row: Fields) -> Conversation:
    """{messages: [{role, content, ...}]}, as OpenAI has it; and what `graft data convert` adds: `rejected`, a list of
    whole conversations, and `desirable`."""
    conversation = _with_system(row, read_messages(row, "messages", ROLES))
    rejected = from_json(row, "rejected") or []
    if not isinstance(rejected, list) or not all(isinstance(one, list) for one in rejected):
        raise RowError(f"field 'rejected' must be a list of conversations, this is {rejected!r:.60}")
    others = [read_messages({"rejected": one}, "rejected", ROLES) for one in rejected]
    flag = _flag(row, "desirable") if row.get("desirable") is not None else None
    return Conversation(conversation, read_tools(row), tuple(others), flag)


def sharegpt(row: Fields) -> Conversation:
    """{conversations: [{from, value}]} and its kin: `conversation`, {role, content}, {human, assistant} pairs."""
    key = "conversation" if "conversation" in row and "conversations" not in row else "conversations"
    return Conversation(_with_system(row, read_messages(row, key, SHAREGPT_ROLES)), read_tools(row))


def alpaca(row: Fields) -> Conversation:
    """{instruction, input, output}, or Dolly's {instruction, context, response}: the input or context, where not empty,
    is a paragraph of its own below the instruction."""
    return Conversation([*_prompt_messages(row, "instruction"), *_answer(row, *_answers(row))], read_tools(row))


def prompt_completion(row: Fields) -> Conversation:
    """{prompt, completion}, strings or lists of messages; `system` and `history` if there are. {query, response},
    {question, answer} and {input, output} too; a `context` is a paragraph of its own below the question."""
    return Conversation([*_prompt_messages(row, *QUESTIONS), *_answer(row, *_answers(row))], read_tools(row))


def inputs_targets(row: Fields) -> Conversation:
    """{inputs, targets}, as in Flan, or P3's {inputs_pretokenized, targets_pretokenized}."""
    end = "_pretokenized" if "inputs_pretokenized" in row else ""
    return Conversation([*_prompt_messages(row, f"inputs{end}"), *_answer(row, f"targets{end}")])


def natural_instructions(row: Fields) -> Conversation:
    """{Definition, input, output}, one instance of a task of Super-NaturalInstructions (arXiv:2204.07705), or
    {definition, inputs, targets}. The first of several correct outputs is the answer.

    The first two of the task's `Positive Examples` stand before the input, in the text that Tk-Instruct was trained on
    (github.com/yizhongw/Tk-Instruct at 7c0e400, src/ni_collator.py, with two positive and no negative examples, and
    without the space at its end, which its run_gpt3.py strips). Without examples the input follows the definition."""
    new = "Definition" in row
    definition, text, answer = ("Definition", "input", "output") if new else ("definition", "inputs", "targets")
    task, prompt = _one_text(row, definition), read_text(row, text)
    examples = _examples(row)
    if examples:
        task = f"{_with_full_stop(f'Definition: {task.strip()}')}\n\n"
        prompt = f"Now complete the following example -\n{_with_full_stop(f'Input: {prompt.strip()}')}\nOutput:"
        prompt = "".join([task, *examples, prompt])
    else:
        prompt = "\n\n".join(part for part in (task, prompt) if part)
    return Conversation([Message("user", prompt), Message("assistant", _one_text(row, answer))])


def _examples(row: Fields) -> list[str]:
    """The first examples of a task as Tk-Instruct writes them; those without an output cannot be shown."""
    found = row.get("Positive Examples") or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise RowError(f"field 'Positive Examples' must be a list of {{input, output}}, this is {found!r:.60}")
    fields = [(one.get("input"), one.get("output")) for one in map(read_all, found)]
    pairs = [(question, answer) for question, answer in fields if isinstance(question, str) and isinstance(answer, str)]
    return [
        f" Positive Example {number} -\n{_with_full_stop(f'Input: {question.strip()}')}\n"
        f"{_with_full_stop(f' Output: {answer.strip()}')}\n\n"
        for number, (question, answer) in enumerate(pairs[:EXAMPLES], start=1)
    ]


def _with_full_stop(text: str) -> str:
    """The text, with a full stop where no punctuation mark ends it."""
    return text if text[-1] in string.punctuation else f"{text}."


def prompt(row: Fields) -> Conversation:
    """{prompt}, or a conversation in any of the formats above that ends with a question, for `rl`, where the model
    answers by itself. Scorers compare with the row's own answer, where it has one."""
    conversation = _question(row)
    answered = conversation[-1].role == "assistant"
    answer = None if answered else next((key for key in ANSWERS if row.get(key)), None)
    answers = _answer(row, answer) if answer else []
    return Conversation([*conversation, *answers], read_tools(row), asks=True)


def text(row: Fields) -> Conversation:
    """{text}: raw text, every token of which the model should learn to write."""
    return Conversation([Message(TEXT, read_text(row, "text"))])


# What was liked more, and what less ---------------------------------------------------------------------------------


def preference(row: Fields) -> Conversation:
    """{prompt, chosen, rejected}: the prompt in any of the formats above, or the beginning that two lists of messages
    (or HH-RLHF's texts) have in common; or a conversation and its {rejected_response} or {rejected_messages}, as
    ms-swift has them."""
    if "chosen" in row:
        chosen, rejected = (_dialogue(row, key) or _answer(row, key) for key in ("chosen", "rejected"))
        whole = chosen[0].role != "assistant"
        if not whole:
            prompt = _question(row)
            chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
        elif chosen[0] != rejected[0]:
            raise RowError("chosen and rejected have no beginning in common: what was asked?")
        found = Conversation(chosen, read_tools(row))
    else:
        found = _supervised(row)
        if row.get("rejected_messages") is not None:
            rejected = read_messages(row, "rejected_messages", SHAREGPT_ROLES)
        else:
            rejected = [*found.messages[:-1], *_answer(row, "rejected_response")]
    if found.messages == rejected:
        raise RowError("the chosen and the rejected answer are the same: nothing is preferred")
    return replace(found, rejected=(rejected,))


def _dialogue(row: Fields, key: str) -> list[Message]:
    """A whole conversation in one text, as Anthropic's HH-RLHF has it (arXiv:2204.05862); empty for any other text."""
    text = row.get(key)
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return []
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], turn.strip()) for who, turn in zip(parts[::2], parts[1::2], strict=True)]


def feedback(row: Fields) -> Conversation:
    """Any conversation with a `label`, `desirable` or `kto_tag`, which says whether its answer was liked."""
    key = next((key for key in FLAGS if key in row), FLAGS[0])
    return replace(_supervised(row), desirable=_flag(row, key))


def ranked(row: Fields) -> Conversation:
    """{prompt, responses, scores} (more is better) or {prompt, responses, ranks} (1 is best). The best is the answer;
    the others are the rejected ones, but not those that are as good as the best."""
    key = "responses" if "responses" in row else "completions"
    answers, order = listed(row, key), "scores" if "scores" in row else "ranks"
    values = listed(row, order)
    if len(values) != len(answers):
        raise RowError(f"there are {len(answers)} {key} and {len(values)} {order}")
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, int | float)]:
        raise RowError(f"{order} must be numbers, one is {wrong[0]!r:.60}")
    sign = -1 if order == "scores" else 1
    best, *rest = sorted(range(len(values)), key=lambda i: sign * values[i])
    worse = [i for i in rest if values[i] != values[best]]
    if not worse:
        raise RowError(f"all {order} are the same: nothing is preferred")
    prompt, tools = _question(row), read_tools(row)
    whole = {i: [*prompt, *_answer({key: answers[i]}, key)] for i in (best, *worse)}
    return Conversation(whole[best], tools, tuple(whole[i] for i in worse))


FORMATS: dict[str, Callable[[Fields], Conversation]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "prompt": prompt,
    "text": text,
    "preference": preference,
    "feedback": feedback,
    "ranked": ranked,
    "natural-instructions": natural_instructions,
    "inputs-targets": inputs_targets,
}

QUESTIONS, ANSWERS = ("prompt", "query", "question", "input"), ("completion", "response", "answer", "output")
EXAMPLES = 2
"""Examples of a task of Super-NaturalInstructions in a prompt, as Tk-Instruct was trained."""
PARAGRAPHS = {"instruction": ("input", "context"), "question": ("context",), "input": ("context",)}
"""Field of the question -> fields that become a paragraph of their own below it."""
FLAGS = ("label", "desirable", "kto_tag")
_FLAG_TEXTS = ("true", "True", "TRUE", "false", "False", "FALSE")
"""A .csv file has only text."""
ALONE = QUESTIONS[:3]
"""Fields that hold a question even in a row without an answer."""
BESIDE_A_PROMPT = ("system", "history", "tools", "group", "context")
"""Fields that a question without an answer may have beside it. A row with any other field is refused: the name of its
answer is probably misspelt."""

_SIGNS: dict[str, tuple[frozenset[str], ...]] = {
    "natural-instructions": (
        frozenset({"Definition", "input", "output"}),
        frozenset({"definition", "inputs", "targets"}),
    ),
    "preference": tuple(frozenset(k.split()) for k in ("chosen rejected", "rejected_response", "rejected_messages")),
    "ranked": tuple(frozenset({a, b}) for a in ("responses", "completions") for b in ("scores", "ranks")),
    "messages": (frozenset({"messages"}),),
    "sharegpt": (frozenset({"conversations"}), frozenset({"conversation"})),
    "alpaca": tuple(frozenset({"instruction", answer}) for answer in ("output", "response", "completion", "answer")),
    "prompt-completion": tuple(frozenset({a, b}) for a in QUESTIONS for b in ANSWERS),
    "inputs-targets": tuple(frozenset({f"inputs{end}", f"targets{end}"}) for end in ("", "_pretokenized")),
    "text": (frozenset({"text"}),),
}
_SUPERVISED = ("messages", "sharegpt", "alpaca", "prompt-completion", "inputs-targets")


def detect(row: Fields) -> str:
    """The name of the format whose keys the row has; raises RowError that says what was found and what is known.

    A `label` may be a class: only one that is true or false is feedback on the answer.
    """
    keys = set(row)
    for name, signs in _SIGNS.items():
        if any(sign <= keys for sign in signs):
            flagged = name in _SUPERVISED and _flagged(row)
            return "feedback" if flagged and not (name == "messages" and "desirable" in keys) else name
    if keys & set(ALONE) and keys <= {*ALONE, *BESIDE_A_PROMPT}:
        return "prompt"
    formats = "; ".join(f"{name}: {', '.join(sorted(signs[0]))}" for name, signs in _SIGNS.items())
    raise RowError(
        f"fields {sorted(map(str, keys))} fit no known format. Known: {formats}; feedback: one of these with a label "
        f"that is true or false. {_template(row)}"
    )


_LIKE_ANSWERS = (*ANSWERS, "answers", "solution", "target", "label", "summary", "reply", "assistant", "translation")


def _template(row: Fields) -> str:
    """What to write into the recipe so that the fields of this row are read."""
    found = [key for key, value in row.items() if isinstance(value, str | int | float) and not {*"{}"} & {*str(key)}]
    if len(found) < 2:
        return "`templates` in the recipe make conversations of rows with two fields at least"
    answer = next((key for name in _LIKE_ANSWERS for key in found if str(key).lower() == name), found[-1])
    fields_text = "\n\n".join(f"{{{key}}}" for key in found if key != answer)
    prompt, completion = (json.dumps(text, ensure_ascii=False) for text in (fields_text, f"{{{answer}}}"))
    return (
        "To read these fields, write into the recipe `data: {train: {path: ..., templates: ...}}`, without the fields "
        f"that say nothing: templates: [{{prompt: {prompt}, completion: {completion}}}]"
    )


# Parts that formats share ------------------------------------------------------------------------------------------


def _supervised(row: Fields) -> Conversation:
    """The conversation of a row that has something beside it."""
    for name in _SUPERVISED:
        if any(sign <= set(row) for sign in _SIGNS[name]):
            return FORMATS[name](row)
    raise RowError(f"fields {sorted(map(str, row))} hold no conversation: {', '.join(_SUPERVISED)}")


def _question(row: Fields) -> list[Message]:
    """What is asked, in whichever format, where the answers stand elsewhere."""
    for key, roles in (("messages", ROLES), ("conversations", SHAREGPT_ROLES), ("conversation", SHAREGPT_ROLES)):
        if key in row:
            return _with_system(row, read_messages(row, key, roles))
    if "instruction" in row:
        return _prompt_messages(row, "instruction")
    return _prompt_messages(row, *QUESTIONS)


def _prompt_messages(row: Fields, *keys: str) -> list[Message]:
    """The system, the history and the question, which stands in the first of these fields that there is."""
    key = next((key for key in keys if key in row), keys[0])
    if isinstance(row.get(key), list):
        question = read_messages(row, key, ROLES)
    else:
        extra = [read_text(row, name, default="") for name in PARAGRAPHS.get(key, ())]
        text = read_text(row, key)
        question = [Message("user", "\n\n".join([text, *filter(None, extra)]))]
    return _with_system(row, [*_history(row), *question])


def _answers(row: Fields) -> tuple[str, ...]:
    """The fields that may hold the answer, those of the row's own kind first; `input` is a question beside `output`."""
    return ("output", *ANSWERS) if "instruction" in row else ANSWERS


def _answer(row: Fields, *keys: str) -> list[Message]:
    """An answer: text, one message, or messages; in the first of these fields that there is."""
    key = next((key for key in keys if key in row), keys[0])
    value = row.get(key)
    if isinstance(value, dict):
        return read_messages({key: [value]}, key, SHAREGPT_ROLES)
    if isinstance(value, list):
        return read_messages(row, key, SHAREGPT_ROLES)
    return [Message("assistant", read_text(row, key))]


def _with_system(row: Fields, conversation: list[Message]) -> list[Message]:
    """The messages, with the field `system` before them where there is one."""
    if not row.get("system"):
        return conversation
    system = Message("system", read_text(row, "system"))
    if conversation[0].role != "system":
        return [system, *conversation]
    if conversation[0].content != system.content:
        raise RowError("there are two different system messages: the field 'system' and the first message")
    return conversation


def _history(row: Fields) -> list[Message]:
    """[[question, answer], ...] before the question of the row."""
    turns = from_json(row, "history") or []
    pairs = isinstance(turns, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns)
    if not pairs or not all(isinstance(content, str) for turn in turns for content in turn):
        raise RowError(f"field 'history' must be a list of [question, answer], this is {turns!r:.60}")
    return [Message(role, content) for turn in turns for role, content in zip(("user", "assistant"), turn, strict=True)]


def _flagged(row: Fields) -> bool:
    """Whether the row has feedback on its answer: a `label` that is true or false, or any value in the other FLAGS."""
    label, *others = (row.get(key) for key in FLAGS)
    return isinstance(label, bool) or label in _FLAG_TEXTS or any(value is not None for value in others)


def _flag(row: Fields, key: str) -> bool:
    value = row.get(key)
    if value in _FLAG_TEXTS:
        return str(value).lower() == "true"
    if not isinstance(value, bool):
        if value is None:
            raise missing(row, key)
        raise RowError(f"field {key!r} must be true or false, this is {value!r:.60}")
    return value


def _one_text(row: Fields, key: str) -> str:
    value = row.get(key)
    return read_text({key: value[0]}, key) if isinstance(value, list) and value else read_text(row, key)


# The whole ---------------------------------------------------------------------------------------------------------

INVISIBLE = frozenset("\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u3164")
"""Characters that show nothing and that Python does not call white space."""
_DAMAGE = re.compile("\0|[\ud800-\udfff]|\ufffd\ufffd")


def check(conversation: list[Message], *, asks: bool = False) -> list[str]:
    """Raise RowError for a conversation that no template can render as it was meant; return notes on one that can stay.

    A trailing question is allowed (it trains nothing). Two turns of one role in a row, a late system message and a
    conversation that begins with an answer are not allowed: templates refuse them or write something else.
    """
    before = ""
    for index, message in enumerate(conversation):
        where, role = f"message {index + 1} ({message.role})", message.role
        for content in (message.content, message.thinking):
            if not content.isascii() or "\0" in content:
                _check_characters(content, where)
        if role in ("assistant", TEXT) and not message.tool_calls and _blank(message.content):
            what = "is blank, its characters cannot be seen" if message.content else "is empty"
            raise RowError(f"{where} {what}: there is nothing to learn from")
        if role == "system" and index:
            raise RowError(f"{where} comes late: a system message is the first or there is none")
        if role == "assistant" and before in ("", "assistant"):
            why = "the conversation begins with an answer" if not before else "two answers follow each other"
            raise RowError(f"{where}: {why}, and to what? Every answer needs a question before it")
        if role == "user" and before == "user":
            raise RowError(f"{where}: two questions follow each other. Make one message of them, or put in the answer")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(f"{where} is the result of a tool that no assistant has called before it")
        before = role
    if asks:
        if before == "system":
            raise RowError("there is a system message and no question: what is to be answered?")
        return []
    answers = [m for m in conversation if m.role in ("assistant", TEXT)]
    if not answers:
        raise RowError(
            f"no assistant message among {[m.role for m in conversation]}: there is nothing to learn from. (Where the "
            "model is to answer by itself, with `rl` in the recipe: format prompt)"
        )
    weights = [*(m.weight for m in answers), *(m.weight or 0 for m in conversation)]
    if not any(weight is None or weight > 0 for weight in [*weights, *(w for m in conversation for *_, w in m.spans)]):
        raise RowError("every answer has the weight 0: there is nothing to learn from")
    return [f"ends with a {before} message, which trains nothing"] if before in ("user", "tool") else []


def _check_characters(content: str, where: str) -> None:
    found = _DAMAGE.search(content)
    if found is None:
        return
    if found[0] == "\0":
        raise RowError(f"{where} contains a NUL character: clean the text")
    if found[0] == "\ufffd\ufffd":
        raise RowError(f"{where} has lost characters: U+FFFD several times from character {found.start()} on")
    raise RowError(f"{where} contains a lone surrogate ({found[0]!r} at character {found.start()}): not valid text")


def _blank(content: str) -> bool:
    return all(character.isspace() or character in INVISIBLE for character in content)
