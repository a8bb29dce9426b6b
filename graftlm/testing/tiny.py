"""Tiny models and tokenizers."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of two layers, float32, in evaluation mode; any architecture by its model type.

    `changes` are fields of its config. Returns the model of transformers. Raises ValueError for a model type that
    transformers does not know.
    """
    return tiny_of(AutoConfig.for_model(model_type, **(TINY | changes)), seed=seed)


def tiny_of(config: Any, *, seed: int = 0) -> Any:
    """The same of a config of transformers.

    Gains of norms and biases, which start as ones and zeros, are random too: else a mistake with them would not show.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval().requires_grad_(False)


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of at most 300 tokens, trained here and now on a few sentences.

    Returns a fast tokenizer of transformers with this chat template. Raises nothing.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the user asks and the assistant answers in one line\n\n", "  a system tells"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2], pad_token=special[0]
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny_base(folder: Path, *, seed: int = 0, template: str | None = CHATML, **changes: Any) -> Path:
    """Write a folder that `load_base` loads: the tiny model and the tiny tokenizer.

    Returns the folder. Raises OSError where it cannot be written.
    """
    tiny_model(seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


def tiny_gpt2(*, seed: int = 0) -> Any:
    return tiny_model(
        "gpt2", seed=seed, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, num_key_value_heads=4
    )
