"""Chat templates of the shapes that are out there, small, and what each should train of an answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from graftlm.data.sources.formats import Message
from graftlm.testing.tiny import CHATML, tiny_tokenizer


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

MISTRAL = (  # the first generation: markers are text
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # the third: markers are control tokens, and there are tools
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list | length) %}{% set n = namespace(u=0) %}"
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set n.u = n.u + 1 %}"
    "{% if tools and n.u == last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% elif m['role'] == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}"
    "{{ ']' + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DEEPSEEK = (  # what was thought before an earlier answer is not repeated
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}"
    "{% else %}{{ '<\uff5cAssistant\uff5c>' }}"
    "{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(m['role'], '<|SYSTEM_TOKEN|>') }}"
    "{{ m['content'] + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
TULU = (  # an answer that is not the last has a line break after its end
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
QWEN = (  # tools in the system turn, calls in tags, results as user turns; thoughts are shown after the last question
    "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' and tools and loop.first %}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > n.last %}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '\\n' if m['content'] or not loop.first }}"
    "{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

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
    "mistral, first": Shape(MISTRAL, lambda answer: answer + "</s>", bos="<s>", eos="</s>", system=False),
    "mistral, third": Shape(
        MISTRAL3,
        lambda answer: " " + answer.strip() + "</s>",
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"],
        bos="<s>",
        eos="</s>",
        system=False,
    ),
    "phi-3": Shape(
        PHI3,
        lambda answer: answer + "<|end|>",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
        eos="<|endoftext|>",
    ),
    "phi-4": Shape(PHI4, lambda answer: answer + "<|im_end|>", ["<|im_sep|>"]),
    "vicuna": Shape(VICUNA, lambda answer: " " + answer + "</s>", eos="</s>"),
    "deepseek": Shape(
        DEEPSEEK,
        lambda answer: answer + "<|end|>",
        ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"],
        bos="<|begin|>",
        eos="<|end|>",
    ),
    "command-r": Shape(
        COMMAND_R,
        lambda answer: answer + "<|END_OF_TURN_TOKEN|>",
        ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"],
        bos="<BOS_TOKEN>",
    ),
    "tulu": Shape(TULU, lambda answer: answer + "<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>"),
}

THINKING = Shape(
    QWEN, lambda answer: "<think>\n\n</think>\n\n" + answer + "<|im_end|>", ["<tool_call>", "</tool_call>"]
)
"""With several answers it is no single row: what it writes before an answer depends on what follows."""


def tokenizer_for(name: str) -> Any:
    """The tiny tokenizer with the special tokens and the template of a shape."""
    return tokenizer_of(SHAPES[name])


def tokenizer_of(shape: Shape) -> Any:
    tokenizer = tiny_tokenizer(shape.template)
    special_tokens = {"bos_token": shape.bos, "eos_token": shape.eos}
    tokenizer.add_special_tokens({key: value for key, value in special_tokens.items() if value})
    tokenizer.add_special_tokens({"additional_special_tokens": shape.special})
    return tokenizer


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, after a system message if there is one."""
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [Message("system", system), *turns] if system is not None else turns
