"""The model card of an adapter."""

from collections.abc import Mapping

from torch import nn

from graftlm import __version__
from graftlm.adapters.peft import why_not_peft
from graftlm.deltas import METHODS
from graftlm.hub.fingerprint import base_record, fingerprint, public_name
from graftlm.hub.locate import PACKAGED
from graftlm.model.registry import attachment, parameters_of


def model_card(model: nn.Module, name: str = "default", facts: Mapping[str, str] | None = None) -> str:
    """A README.md in the hub's format, filled in: what it is, what it belongs to, how to use it, and given facts."""
    record, base, own = attachment(model), public_name(model), base_record(model).name
    config = record.configs[name]
    method = METHODS[config.method]
    count = sum(p.numel() for p in parameters_of(model, name))
    rows = {
        "base": base,
        "base fingerprint": fingerprint(model).digest,
        "method": f"{config.method} ({method.delta.paper})",
        "trainable parameters": f"{count:,} on {len(record.sites[name])} sites",
        **(facts or {}),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    reason = why_not_peft(model, name)
    library = "graftlm" if reason else "peft"
    usage = (
        f"PEFT does not load the folder: {reason}. `graft export` makes what other tools read."
        if reason
        else "The folder is in PEFT's layout: `PeftModel.from_pretrained(base, folder)` loads it too."
    )
    return f"""---
library_name: {library}
base_model: {base}
pipeline_tag: text-generation
tags: ["base_model:adapter:{base}", {config.method}, transformers, graftlm]
---

# Adapter for {base}

| | |
|---|---|
{table}

## Use

```
graft generate "..." --base {own if own in PACKAGED else base} --adapter .
```

{usage}
Written by graftlm {__version__}.
"""
