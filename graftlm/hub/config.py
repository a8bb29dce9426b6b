"""Which base a recipe means, and in which dtype and quantization it is loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from graftlm.config.dtypes import Dtype, Quantization, instead_of_store
from graftlm.config.schema import Flag, config


@config
class BaseConfig:
    """The base model: where it is, its dtype and its quantization. A wrong value raises a ValueError."""

    name: str
    """`smollm2`, a folder, a .gguf file, or a hub id."""
    dtype: Dtype = "auto"
    """Dtype of the frozen weights; auto: bfloat16 where the machine multiplies bfloat16 fast, float32 elsewhere. fp32,
    bf16 and fp16 are accepted too."""
    quantization: Quantization = "none"
    """int8, int4 and nf4 quantize the linear layers but the output head to 8.1, 5.5 and 4.13 bits a weight; `dtype` is
    that of everything else and of the products. Weights are rounded to bfloat16 before they are quantized."""
    REPLACED: ClassVar[Mapping[str, Callable[[object], str]]] = {"store": instead_of_store("base")}
    """Keys of earlier versions, and what took their place."""
    revision: str | None = None
    template: str | None = None
    """A .jinja file to use as chat template, for a base that has none."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, as in `data.template_variables`, which goes before these."""
    run_code_shipped_with_the_model: Flag = False
    """DANGER: lets the model's folder run any Python code in it as you (trust_remote_code in transformers)."""


def base_config(base: str | Path | BaseConfig) -> BaseConfig:
    """The config of a base that may be given by its name alone."""
    return base if isinstance(base, BaseConfig) else BaseConfig(name=str(base))
