"""Chat templates of the shapes that are out there, small, and what each should train of an answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graftlm.data.formats import Message
from graftlm.testing import CHATML, tiny_tokenizer


@dataclass(frozen=True)
class Shape:
    template: str
    trained: Callable[[str], str]
    """From an answer's text to all that generation has to write: the answer and its end of turn."""
    special: list[str] = field(default_factory=list)
    bos: str | None = None
    eos: str | None = None
    system: bool = True


LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}"
    "{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + m['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
HEADED = (  # the white space around an answer is the answer's, and a line break of the template stands before it
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

SHAPES: dict[str, Shape] = {
    "chatml": Shape(CHATML, lambda answer: answer + "<|im_end|>"),
    "llama-2": Shape(LLAMA2, lambda answer: " " + answer.strip() + " </s>", bos="<s>", eos="</s>"),
    "llama-3": Shape(LLAMA3, lambda answer: answer.strip() + "<|eot_id|>", HEADERS, bos="<|begin_of_text|>"),
    "gemma": Shape(
        GEMMA,
        lambda answer: answer.strip() + "<end_of_turn>",
        ["<start_of_turn>", "<end_of_turn>"],
        bos="<bos>",
        system=False,
    ),
    "zephyr": Shape(ZEPHYR, lambda answer: answer + "</s>", eos="</s>"),
    "alpaca": Shape(ALPACA, lambda answer: answer + "</s>", eos="</s>"),
    "headed": Shape(HEADED, lambda answer: answer + "<|eot_id|>", HEADERS, bos="<|begin_of_text|>"),
}


def tokenizer_for(name: str) -> Any:
    """The tiny tokenizer with the special tokens and the template of a shape."""
    shape = SHAPES[name]
    tokenizer = tiny_tokenizer(shape.template)
    named = {"bos_token": shape.bos, "eos_token": shape.eos}
    tokenizer.add_special_tokens({key: value for key, value in named.items() if value})
    tokenizer.add_special_tokens({"additional_special_tokens": shape.special})
    return tokenizer


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, after a system message if there is one."""
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [Message("system", system), *turns] if system is not None else turns
