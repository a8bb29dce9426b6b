"""A .gguf file as a safetensors folder, converted once."""

import gc
import hashlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from graftlm.errors import BaseModelError, first_lines
from graftlm.files import cache_folder


def converted(gguf: Path) -> Path:
    """A plain safetensors folder of a .gguf file, made once: it loads in half a second, the file itself in 25."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "bases" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise BaseModelError(
            f"{gguf.name}: reading GGUF needs an extra: pip install 'graftlm[gguf]'", code="missing-package"
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # The loader leaves its mark, and saving then refuses weights that in truth are plain float32.
        model.hf_quantizer = None
        for mark in ("is_quantized", "quantization_method"):
            if hasattr(model, mark):
                delattr(model, mark)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _separate_pad(tokenizer, model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.is_dir():  # another process was faster
            return folder
        raise BaseModelError(f"{gguf}: cannot be converted: {first_lines(error)}", code="unusable-gguf") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    del model
    gc.collect()
    return folder


def _separate_pad(tokenizer: Any, model: Any) -> None:
    """Padding must not be the token that ends a turn: whoever masks padding by id would never teach stopping."""
    others = [t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token)]
    if tokenizer.pad_token in (None, tokenizer.eos_token) and others:
        tokenizer.pad_token = others[0]
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
