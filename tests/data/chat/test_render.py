"""Messages -> ids and roles: every shape of template, on conversations that try to break it."""

import os
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graftlm.data.chat.masks import weights
from graftlm.data.chat.render import Renderer
from graftlm.data.chat.roles import Rendered, Role
from graftlm.data.sources.formats import TEXT, Message
from graftlm.testing import tiny_tokenizer
from tests.data.shapes import SHAPES, THINKING, chat, tokenizer_for, tokenizer_of
from tests.errors import raises

CONVERSATIONS = {
    "plain": chat("the user asks", "the assistant answers"),
    "with a system": chat("the user asks", "one line", system="  a system tells"),
    "several turns": chat("one", "two", "three", "four", "five", "six"),
    "ends with a user": chat("one", "two", "three"),
    "system and several turns": chat("one", "two", "three", "four", system="be brief"),
    "the same text everywhere": chat("the", "the", "the", "the", system="the"),
    "spaces around the answer": chat("one", "  two  ", " three ", "\tfour\t"),
    "line breaks around the answer": chat("one\n\n", "\n\ntwo\n\n", "\nthree", "\nfour\n"),
    "line break, then spaces": chat("one", "\n  two", "three", "  \n\nfour"),
    "emoji": chat("\U0001f600", "\U0001f469\u200d\U0001f680 and \U0001f1ea\U0001f1fa\u00df\u4e2d\u6587"),
    "combining characters": chat("e\u0301", "\u0301e\u0301 n\u0303 a", "x", "\u0302"),
    "icons for private use": chat("\U000f0000 \U000f0001", "\U000f0000\U0010fffd \U00100000"),
    "markers of templates": chat(
        "<|im_start|>assistant\nthe user<|im_end|>\n[/INST] </s><end_of_turn>\n<|eot_id|>",
        "one</s><|im_end|>\n<|im_start|>user\n### Response:\ntwo<|eot_id|><end_of_turn> [INST] three",
    ),
    "an end of turn as the whole answer": chat("one", "<|im_end|></s><|eot_id|><end_of_turn>"),
    "an empty question": chat("", "one", "  ", "two"),
}


def text_of(renderer: Renderer, ids: Any) -> str:
    return str(renderer.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def runs(renderer: Renderer, rendered: Rendered, keep: Any) -> list[str]:
    """The text of each unbroken run of tokens that are kept."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(keep, int), [0]])))
    return [text_of(renderer, rendered.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def supervised(renderer: Renderer, rendered: Rendered) -> list[str]:
    return runs(renderer, rendered, weights(rendered, "response") == 1)


def check_everything(name: str, renderer: Renderer, messages: list[Message]) -> None:
    """All that is promised of a rendered conversation."""
    shape, found = SHAPES[name], renderer.rows(messages)
    answers = [index for index, m in enumerate(messages) if m.role == "assistant"]
    trained = [text for rendered in found for text in supervised(renderer, rendered)]
    assert trained == [shape.trained(messages[i].content) for i in answers], "what is trained"

    if len(found) == 1 and found[0].text == plainly(renderer, messages):
        check_row(renderer, found[0], messages, answers)
        return
    first = 0
    for rendered, answer in zip(found, answers, strict=True):
        assert rendered.first == first
        first = answer + 1
        check_row(renderer, rendered, messages[:first], [answer])


def check_row(renderer: Renderer, rendered: Rendered, messages: list[Message], answers: list[int]) -> None:
    text = plainly(renderer, messages)
    assert text_of(renderer, rendered.ids) == rendered.text == text, "what is fed"
    assert (rendered.ids.dtype, rendered.roles.dtype) == (np.int32, np.uint8)
    assert len(rendered.roles) == len(rendered.ids) == len(rendered.turns) == len(rendered.row_weights)

    for role, kind in ((Role.SYSTEM, "system"), (Role.USER, "user")):
        wanted = [m.content.strip() for m in messages if m.role == kind and m.content.strip()]
        there = runs(renderer, rendered, rendered.roles == role)
        assert len(there) == len(wanted), f"a run of {kind} for each of its messages"
        assert all(w in f for w, f in zip(wanted, there, strict=True)), f"the text of {kind} messages"

    for index in answers:
        prompt = renderer.prompt(messages[:index])
        assert prompt.tolist() == rendered.ids[: len(prompt)].tolist(), f"prompt of message {index + 1}"
        assert rendered.roles[len(prompt)] in (Role.ASSISTANT, Role.END_OF_TURN), "the answer begins there"
        assert rendered.turns[len(prompt)] == index
        # The second way: turn by turn, what is written after the prompt begins with what is trained and then says
        # no more of the answer.
        own = text_of(renderer, rendered.ids[(rendered.turns == index) & np.isin(rendered.roles, TRAINED)])
        written = plainly(renderer, messages[: index + 1])[len(plainly(renderer, messages[:index], answer_next=True)) :]
        assert written.startswith(own), f"what follows the prompt of message {index + 1}"
        rest = written[len(own) :]
        assert not rest.strip() or all(rest.strip() == token for token in (renderer.tokenizer.eos_token,)), rest


TRAINED = (Role.ASSISTANT, Role.END_OF_TURN)


def plainly(renderer: Renderer, messages: list[Message], *, answer_next: bool = False, **more: Any) -> str:
    """What transformers itself makes of messages."""
    chat_of_dicts = [
        {"role": m.role, "content": m.content}
        | ({"tool_calls": list(m.tool_calls)} if m.tool_calls else {})
        | ({"reasoning_content": m.thinking} if m.thinking else {})
        for m in messages
    ]
    return str(
        renderer.tokenizer.apply_chat_template(chat_of_dicts, tokenize=False, add_generation_prompt=answer_next, **more)
    )


@pytest.fixture(scope="module", params=SHAPES)
def shape_and_renderer(request: pytest.FixtureRequest) -> tuple[str, Renderer]:
    return request.param, Renderer(tokenizer_for(request.param))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_what_is_trained_is_each_answer_with_its_end_and_prompts_are_prefixes(
    shape_and_renderer: tuple[str, Renderer], conversation: str
) -> None:
    name, renderer = shape_and_renderer
    messages = CONVERSATIONS[conversation]
    if messages[0].role == "system" and not SHAPES[name].system:
        with raises("data/template-refuses-conversation", match="of system, user, assistant"):
            renderer.conversation(messages)
    else:
        check_everything(name, renderer, messages)


PIECES = [
    *(
        "the user",
        "asks",
        " answers",
        "a",
        "e\u0301",
        "\u0301",
        "\U0001f600",
        "\u4e2d",
        "1",
        ".",
        "'s",
        "#",
        "\U000f0001",
    ),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028"),
    *("<|im_start|>", "<|im_end|>\n", "</s>", "<s>", "[INST]", "[/INST]", "### Response:\n", "<|eot_id|>"),
    *("<end_of_turn>\n", "<start_of_turn>model\n", "<|assistant|>\n", "<|end_header_id|>\n\n", "{{ x }}", "{% y %}"),
]


def random_conversation(seed: int, system: bool) -> list[Message]:
    draw = random.Random(seed)

    def content() -> str:
        return "".join(draw.choices(PIECES, k=draw.randint(1, 7)))

    def answer() -> str:
        text = content()
        return text if text.strip() else text + draw.choice(["b", "\u00e9"]) + content()

    turns = [answer() if i % 2 else content() for i in range(draw.randint(2, 7))]
    return chat(*turns, system=content() if system and draw.random() < 0.4 else None)


CONVERSATIONS_EACH = int(os.environ.get("CONVERSATIONS", "60"))
"""Random conversations for each template; benchmarks/masks asks for thousands."""


def test_random_conversations_hold_every_promise(shape_and_renderer: tuple[str, Renderer]) -> None:
    name, renderer = shape_and_renderer
    for seed in range(CONVERSATIONS_EACH):
        messages = random_conversation(seed, SHAPES[name].system)
        try:
            check_everything(name, renderer, messages)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {messages}") from error


def test_the_roles_of_a_conversation_are_the_ones_a_person_would_write() -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    rendered = renderer.conversation(chat("X", "Y", system="Z"))
    golden = [
        ("<|im_start|>", Role.SPECIAL),
        ("system", Role.BOILERPLATE),
        ("\n", Role.BOILERPLATE),
        ("Z", Role.SYSTEM),
        ("<|im_end|>", Role.SPECIAL),
        ("\n", Role.BOILERPLATE),
        ("<|im_start|>", Role.SPECIAL),
        ("user", Role.BOILERPLATE),
        ("\n", Role.BOILERPLATE),
        ("X", Role.USER),
        ("<|im_end|>", Role.SPECIAL),
        ("\n", Role.BOILERPLATE),
        ("<|im_start|>", Role.SPECIAL),
        ("assistant", Role.BOILERPLATE),
        ("\n", Role.BOILERPLATE),
        ("Y", Role.ASSISTANT),
        ("<|im_end|>", Role.END_OF_TURN),
        ("\n", Role.BOILERPLATE),
    ]
    joined: list[tuple[str, Role]] = []  # "assistant" is several tokens
    for text, role in zip(renderer.token_texts(rendered.ids.tolist()), rendered.roles, strict=True):
        if joined and joined[-1][1] == role == Role.BOILERPLATE and text.isalpha() and joined[-1][0].isalpha():
            joined[-1] = (joined[-1][0] + text, Role.BOILERPLATE)
        else:
            joined.append((text, Role(role)))
    assert joined == golden


def test_white_space_around_a_text_is_part_of_it_unless_the_template_trims_it() -> None:
    whole, trimmed = (Renderer(tokenizer_for(name)) for name in ("chatml", "llama-3"))
    for renderer, question, answer in ((whole, " X\t", "\tY "), (trimmed, "X", "Y")):
        rendered = renderer.conversation(chat(" X\t", "\tY "))
        assert runs(renderer, rendered, rendered.roles == Role.USER) == [question]
        assert runs(renderer, rendered, rendered.roles == Role.ASSISTANT) == [answer]


def test_an_answer_that_begins_with_a_line_break_is_fed_as_generation_feeds_it() -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    one, two = (renderer.tokenizer.convert_tokens_to_ids(t) for t in ("\u010a", "\u010a\u010a"))
    assert two != renderer.tokenizer.unk_token_id, "this test needs a tokenizer that knows a double line break"
    prompt = renderer.prompt(chat("a"))
    rendered = renderer.conversation(chat("a", "\nb"))
    assert prompt[-1] == one
    assert rendered.ids[len(prompt) - 1 : len(prompt) + 1].tolist() == [one, one], "not the one token of both"


def test_what_follows_an_answer_does_not_change_the_prompt_before_it() -> None:
    """This tokenizer looks ahead: a double line break is one token at the end of a text and two before a letter."""
    renderer = Renderer(tokenizer_for("llama-3"))
    two = renderer.tokenizer.convert_tokens_to_ids("\u010a\u010a")
    prompt = renderer.prompt(chat("a"))
    assert prompt[-1] == two
    assert renderer.conversation(chat("a", "b")).ids[: len(prompt)].tolist() == prompt.tolist()


def test_an_icon_of_a_private_plane_in_the_text_is_no_mark() -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    icons = "".join(chr(0xF0000 + i) for i in range(8))
    assert supervised(renderer, renderer.conversation(chat(icons, icons))) == [icons + "<|im_end|>"]


def test_what_the_template_writes_between_prompt_and_answer_is_trained_with_it() -> None:
    thinking = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    renderer = Renderer(tiny_tokenizer(thinking))
    trained = supervised(renderer, renderer.conversation(chat("a", "b")))
    assert trained == ["<think>\n\n</think>\n\nb<|im_end|>"]


def test_templates_may_write_which_call_a_tool_answers_and_its_name() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
        "{% if m['role'] == 'tool' %}{{ ' ' + m.name + ' ' + m['tool_call_id'] }}{% endif %}"
        "{{ '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    renderer = Renderer(tiny_tokenizer(template))
    turns = [*chat("a", "b"), Message("tool", "c", call_id="i1", name="add"), Message("assistant", "d")]
    rendered = renderer.conversation(turns)
    assert "<|im_start|>tool add i1\nc<|im_end|>" in rendered.text
    assert runs(renderer, rendered, rendered.roles == Role.TOOL) == ["c"]


def test_what_the_prompt_already_holds_of_an_answer_is_not_trained() -> None:
    opened = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    renderer = Renderer(tiny_tokenizer(opened))
    assert supervised(renderer, renderer.conversation(chat("a", "<think>\nb"))) == ["b<|im_end|>"]
    assert supervised(renderer, renderer.conversation(chat("a", "b"))) == ["\n</think>\n\nb<|im_end|>"]


def test_a_template_that_begins_an_answer_otherwise_than_it_writes_it_is_refused() -> None:
    other = TURNS.replace("%}assistant: {%", "%}model: {%")
    renderer = Renderer(tiny_tokenizer(other))
    with raises("data/prompt-mismatch", match="message 2 with .*model: "):
        renderer.conversation(chat("a", "b"))


def test_an_end_of_turn_that_is_not_called_special_is_still_where_an_answer_ends() -> None:
    template = SHAPES["chatml"].template.replace("<|im_end|>", "<|stop|>")
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken("<|stop|>", special=False)])
    renderer = Renderer(tokenizer)
    assert supervised(renderer, renderer.conversation(chat("a", "b", "c", "d"))) == ["b<|stop|>", "d<|stop|>"]
    assert renderer.stop_ids[0] == tokenizer.convert_tokens_to_ids("<|stop|>")


def test_a_control_token_that_swallows_white_space_keeps_its_role() -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    names = ("<|user|>", "<|assistant|>")
    tokenizer.add_tokens([AddedToken(n, rstrip=True, special=True) for n in names], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)], special_tokens=True)
    renderer = Renderer(tokenizer)
    end, answer = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    for text in ("b", "\nb", "b \n"):
        rendered = renderer.conversation(chat("a", text))
        assert rendered.ids[rendered.roles == Role.END_OF_TURN].tolist() == [end], repr(text)
        assert rendered.roles[rendered.ids == answer].tolist() == [Role.SPECIAL], repr(text)
        assert text_of(renderer, rendered.ids[rendered.roles == Role.ASSISTANT]) == text.rstrip(), repr(text)


def test_an_end_of_turn_that_swallows_the_beginning_of_the_next_turn_is_trained() -> None:
    template = (
        "{% for m in messages %}{{ '\\n<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n<|assistant|>' }}{% endif %}"
    )
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    renderer = Renderer(tokenizer)
    assert supervised(renderer, renderer.conversation(chat("a", "b", "c", "d"))) == ["b<|end|>", "d<|end|>"]


def sentencepiece_like(template: str) -> Any:
    """A tokenizer that puts a space before every text, as Llama 2 has it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the user asks the assistant answers QA: yes no"] * 3, trainer)
    vocabulary = backend.get_vocab()
    known = {**vocabulary, **{b: len(vocabulary) + i for i, b in enumerate(bytes_)}}
    merges = [tuple(m) for m in __import__("json").loads(backend.to_str())["model"]["merges"]]
    backend.pre_tokenizer = None
    backend.model = models.BPE(vocab=known, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_an_answer() -> None:
    template = (
        "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else 'A: ') + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    renderer = Renderer(sentencepiece_like(template))
    messages = chat("the user", "yes", "asks", "no the answers")
    rendered = renderer.conversation(messages)
    tokens = renderer.tokenizer.convert_ids_to_tokens(rendered.ids[rendered.roles == Role.ASSISTANT].tolist())
    assert "".join(tokens) == "yesno\u2581the\u2581answers", "the space before an answer is in the prompt already"
    for index in (1, 3):
        prompt = renderer.prompt(messages[:index])
        assert prompt.tolist() == rendered.ids[: len(prompt)].tolist()


def test_a_space_before_the_answer_that_the_template_writes_stays_joined_to_its_word() -> None:
    renderer = Renderer(sentencepiece_like(SHAPES["llama-2"].template))
    messages = chat("the user", "answers", "asks", "yes")
    rendered = renderer.conversation(messages)
    tokens = renderer.tokenizer.convert_ids_to_tokens(rendered.ids[rendered.roles == Role.ASSISTANT].tolist())
    assert "".join(tokens) == "\u2581answers\u2581yes"
    for index in (1, 3):
        prompt = renderer.prompt(messages[:index])
        assert prompt.tolist() == rendered.ids[: len(prompt)].tolist()


def test_a_tokenizer_that_composes_characters_keeps_spans() -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    renderer = Renderer(tokenizer)
    rendered = renderer.conversation(chat("e\u0301", "n\u0303 e\u0301", "x", "y"))
    assert supervised(renderer, rendered) == ["\u00f1 \u00e9<|im_end|>", "y<|im_end|>"]


# Templates that cannot be trained with -------------------------------------------------------------------------------

ONE = "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}"
TURNS = "{% for m in messages %}" + ONE + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
UNKNOWN, REWRITES = "data/answer-tokens-unknown", "data/template-rewrites-turns"
BROKEN = {
    "forgets": (
        TURNS.replace("in messages", "in messages[-2:]"),
        UNKNOWN,
        "drops message 1 .user.",
    ),
    "rewrites": (TURNS.replace("m['content']", "m['content'] | upper"), UNKNOWN, "rewrites"),
    "repeats": (TURNS.replace(ONE, ONE + ONE), UNKNOWN, "repeats message 1 .user."),
    "shortens": (
        TURNS.replace("m['content']", "m['content'][:2]"),
        UNKNOWN,
        "drops message 1 .user.",
    ),
    "thinks only at the end": (
        TURNS.replace("m['content']", "(('<think>' if loop.last and m['role'] == 'assistant' else '') + m['content'])"),
        REWRITES,
        "message 3",
    ),
    "counts": ("{{ messages | length }}" + TURNS, REWRITES, "message 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_changes_what_it_is_given_is_refused_with_advice(name: str) -> None:
    template, code, what = BROKEN[name]
    with raises(code, match=what) as caught:
        Renderer(tiny_tokenizer(template)).conversation(chat("one", "two", "three", "four"))
    assert "split the conversation so that every answer is the last message" in str(caught.value).lower()


def test_a_template_that_drops_the_system_message_says_which_message_it_drops() -> None:
    template = TURNS.replace(ONE, "{% if m['role'] != 'system' %}" + ONE + "{% endif %}")
    with raises("data/answer-tokens-unknown", match=r"drops message 1 \(system\)"):
        Renderer(tiny_tokenizer(template)).conversation(chat("one", "two", system="be brief"))


def test_what_a_template_says_when_it_refuses_is_passed_on() -> None:
    with raises("data/template-refuses-conversation", match="of user, user: user and assistant take turns"):
        Renderer(tokenizer_for("llama-2")).conversation([Message("user", "a"), Message("user", "b")])


def test_a_conversation_that_begins_with_an_answer_cannot_be_trained_but_can_be_talked_on() -> None:
    messages = [Message("assistant", "hello"), *chat("one", "two")]
    renderer = Renderer(tokenizer_for("chatml"))
    with raises("data/answer-without-question"):
        renderer.conversation(messages)
    assert text_of(renderer, renderer.prompt(messages)).startswith("<|im_start|>assistant\nhello<|im_end|>\n")


def test_an_answer_after_a_system_message_alone_and_two_in_a_row_are_each_trained() -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    messages = [Message("system", "be brief"), *(Message("assistant", text) for text in ("\nhello", "\n\nagain"))]
    assert supervised(renderer, renderer.conversation(messages)) == ["\nhello<|im_end|>", "\n\nagain<|im_end|>"]


def test_a_tool_message_has_a_role_of_its_own() -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    rendered = renderer.conversation([Message("user", "A"), Message("tool", "42"), Message("assistant", "B")])
    assert runs(renderer, rendered, rendered.roles == Role.TOOL) == ["42"]


# Tools, thoughts, and templates that change what they wrote --------------------------------------------------------

CALL = {"type": "function", "function": {"name": "find", "arguments": {"parcel": "A 7"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
WITH_A_TOOL = [
    Message("user", "Where is it?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "in the van"),
    Message("assistant", "It is in the van."),
]


def test_a_call_of_a_tool_is_trained_to_the_token_that_ends_its_turn() -> None:
    renderer = Renderer(tokenizer_for("mistral, third"))
    (rendered,) = renderer.rows(WITH_A_TOOL, TOOLS)
    assert rendered.text == plainly(renderer, WITH_A_TOOL, tools=TOOLS)
    call = '[TOOL_CALLS] [{"name": "find", "arguments": {"parcel": "A 7"}}]</s>'
    assert supervised(renderer, rendered) == [call, " It is in the van.</s>"]
    assert runs(renderer, rendered, rendered.roles == Role.TOOL) == [" in the van"], (
        "its first token begins with a space"
    )
    assert "find" in text_of(renderer, renderer.prompt(WITH_A_TOOL[:1], TOOLS)), "the prompt names the tools"
    for index in (1, 3):
        prompt = renderer.prompt(WITH_A_TOOL[:index], TOOLS)
        assert prompt.tolist() == rendered.ids[: len(prompt)].tolist()


@pytest.mark.parametrize("content", ["", "Let me look."])
def test_a_template_without_a_place_for_calls_is_refused(content: str) -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    calling = [Message("user", "Where is it?"), Message("assistant", content, tool_calls=(CALL,)), *WITH_A_TOOL[2:]]
    with raises("data/template-drops-calls", match="'find' in message 2"):
        renderer.rows(calling, TOOLS)


def test_what_is_no_template_is_an_error_that_says_so() -> None:
    with raises("base/unusable-chat-template", match="endfor"):
        Renderer(tiny_tokenizer("{% for m in messages %}")).rows(chat("a", "b"))


def test_words_and_calls_in_one_answer_are_both_trained() -> None:
    renderer = Renderer(tokenizer_of(THINKING))
    both = [Message("user", "a"), Message("assistant", "Let me look.", tool_calls=(CALL, CALL))]
    (rendered,) = renderer.rows(both, TOOLS)
    assert rendered.text == plainly(renderer, both, tools=TOOLS)
    call = '<tool_call>\n{"name": "find", "arguments": {"parcel": "A 7"}}\n</tool_call>'
    assert supervised(renderer, rendered) == [f"<think>\n\n</think>\n\nLet me look.\n{call}\n{call}<|im_end|>"]


def test_where_thoughts_of_earlier_answers_are_left_out_every_answer_is_a_row_of_its_own() -> None:
    renderer = Renderer(tokenizer_of(THINKING))
    messages = [
        Message("system", "be brief"),
        Message("user", "one"),
        Message("assistant", "two", thinking="hm"),
        Message("user", "three"),
        Message("assistant", "four", thinking="so"),
    ]
    first, second = renderer.rows(messages)
    assert (first.text, second.text) == (plainly(renderer, messages[:3]), plainly(renderer, messages))
    assert "hm" in first.text
    assert "hm" not in second.text
    assert supervised(renderer, first) == ["<think>\nhm\n</think>\n\ntwo<|im_end|>"]
    assert supervised(renderer, second) == ["<think>\nso\n</think>\n\nfour<|im_end|>"]
    assert (first.first, second.first) == (0, 3)
    everything = [runs(renderer, row, weights(row, "instruction") == 1) for row in (first, second)]
    assert everything == [
        ["be brief", "one", "<think>\nhm\n</think>\n\ntwo<|im_end|>"],
        ["three", "<think>\nso\n</think>\n\nfour<|im_end|>"],
    ], "no message is trained twice"


def test_thoughts_within_the_text_of_an_answer_are_thoughts() -> None:
    renderer = Renderer(tokenizer_of(THINKING))
    apart = [Message("user", "a"), Message("assistant", "b", thinking="hm"), *chat("c", "d")]
    within = [Message("user", "a"), Message("assistant", "<think>\nhm\n</think>\n\nb"), *chat("c", "d")]
    for one, other in zip(renderer.rows(apart), renderer.rows(within), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.roles.tolist() == other.roles.tolist()


def test_every_answer_of_a_template_that_marks_the_last_is_fed_as_generation_feeds_it() -> None:
    renderer = Renderer(tiny_tokenizer(BROKEN["thinks only at the end"][0]))
    found = renderer.rows(chat("one", "two", "three", "four"))
    assert [text for row in found for text in supervised(renderer, row)] == [
        "<think>two<|im_end|>",
        "<think>four<|im_end|>",
    ]


def test_weights_of_messages_and_of_spans_are_those_of_their_tokens() -> None:
    renderer = Renderer(tokenizer_for("chatml"))
    messages = [
        Message("user", "the user asks"),
        Message("assistant", "one", weight=0.0),
        Message("user", "and then?", weight=0.5),
        Message("assistant", " the answer is 42.", spans=((15, 17, 3.0),)),
    ]
    (rendered,) = renderer.rows(messages)
    found = weights(rendered, "response")
    assert runs(renderer, rendered, found == 1) == [" the answer is ", ".<|im_end|>"]
    assert runs(renderer, rendered, found == 3) == ["42"]
    assert runs(renderer, rendered, found == 0.5) == ["and then?"]


def test_spans_hold_their_place_where_the_template_trims() -> None:
    renderer = Renderer(tokenizer_for("llama-3"))
    (rendered,) = renderer.rows([Message("user", "a"), Message("assistant", "  b 42", spans=((4, 6, 0.0),))])
    assert runs(renderer, rendered, weights(rendered, "response") == 1) == ["b ", "<|eot_id|>"]


# Raw text, stops, templates ------------------------------------------------------------------------------------------


def test_raw_text_is_trained_whole_and_ends_with_the_end_of_text() -> None:
    renderer = Renderer(tiny_tokenizer())
    rendered = renderer.conversation([Message(TEXT, " the user\n")])
    assert text_of(renderer, rendered.ids) == " the user\n<|im_end|>"
    assert set(rendered.roles[:-1]) == {Role.ASSISTANT}
    assert rendered.roles[-1] == Role.END_OF_TURN


def test_raw_text_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = tokenizer_for("llama-3")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    rendered = Renderer(tokenizer).conversation([Message(TEXT, "a")])
    assert rendered.ids.tolist() == [bos, tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id]
    assert rendered.roles.tolist() == [Role.SPECIAL, Role.ASSISTANT, Role.END_OF_TURN]


def test_raw_text_needs_no_chat_template() -> None:
    rendered = Renderer(tiny_tokenizer(template=None)).conversation([Message(TEXT, "a")])
    assert len(rendered.ids) == 2


STOPS = {
    "chatml": ["<|im_end|>"],
    "llama-2": ["</s>"],
    "llama-3": ["<|eot_id|>", "<|im_end|>"],  # what ends a turn, then the tokenizer's own end of text
    "gemma": ["<end_of_turn>", "<|im_end|>"],
    "zephyr": ["</s>"],
    "alpaca": ["</s>"],
}


@pytest.mark.parametrize("name", STOPS)
def test_generation_stops_at_what_training_ends_an_answer_with(name: str) -> None:
    tokenizer = tokenizer_for(name)
    assert tokenizer.convert_ids_to_tokens(list(Renderer(tokenizer).stop_ids)) == STOPS[name]


def test_a_base_without_template_or_with_one_that_cannot_be_trained_stops_at_its_end_of_text() -> None:
    for template in (None, BROKEN["rewrites"][0]):
        tokenizer = tiny_tokenizer(template)
        assert Renderer(tokenizer).stop_ids == (tokenizer.eos_token_id,)


def test_a_tokenizer_with_no_chat_template_is_refused_with_how_to_give_one() -> None:
    renderer = Renderer(tiny_tokenizer(template=None))
    for ask in (renderer.conversation, renderer.prompt):
        with raises("base/no-chat-template"):
            ask(chat("a", "b"))


def test_a_tokenizer_without_offsets_is_refused_with_what_to_do() -> None:
    with raises("base/no-character-offsets", match="object"):
        Renderer(object())


def test_a_given_template_stands_before_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    assert renderer.conversation(chat("a", "b")).text == "a<|im_end|>b<|im_end|>"
    assert renderer.template_hash != Renderer(tokenizer).template_hash


def test_of_several_templates_of_a_tokenizer_the_default_is_taken() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TURNS, "tool_use": "nothing"}
    assert Renderer(tokenizer).conversation(chat("a", "b")).text == "user: a<|im_end|>assistant: b<|im_end|>"


def test_the_tokenizer_itself_is_not_changed_by_a_renderer() -> None:
    tokenizer = tokenizer_for("llama-3")
    before = tokenizer.backend_tokenizer.to_str()
    Renderer(tokenizer).conversation(chat("a", "b"))
    assert tokenizer.backend_tokenizer.to_str() == before


def test_long_text_is_not_cut_by_a_truncation_that_came_with_the_tokenizer() -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.backend_tokenizer.enable_truncation(4)
    rendered = Renderer(tokenizer).conversation(chat("X" * 50, "Y" * 50))
    assert np.count_nonzero(rendered.roles == Role.USER) == 50


def test_decode_leaves_out_special_tokens_and_tidies_nothing() -> None:
    renderer = Renderer(tiny_tokenizer())
    ids = renderer.conversation([Message(TEXT, " it 's , so .\n")]).ids.tolist()
    assert renderer.decode(ids) == " it 's , so .\n"
