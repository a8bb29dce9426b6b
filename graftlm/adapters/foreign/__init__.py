"""Adapters that another tool wrote in PEFT's layout: which deltas of ours they are.

    <site>.lora_A.weight ...                   the method itself, by its PeftLayout
    <module>.weight, .bias                     modules_to_save: in place of the base's       -> full
    <site>.trainable_tokens_delta              rows of some tokens, in place of the base's   -> trainable-tokens
    <site>.lora_B.bias, <layer>.bias           lora_bias; bias: all or lora_only             -> bitfit
    <layer>.base_layer.weight                  a copy of a frozen weight: it must be the base's

The tensors say where an adapter sits, the config what they mean. A key of the config that is left out has PEFT's
default. Whatever would have to be ignored to load an adapter is an AdapterError.
"""
