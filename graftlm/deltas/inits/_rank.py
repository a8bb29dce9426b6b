"""The rank of the product B A that an init starts, and where it leaves that product alone."""

from torch import Tensor, nn

from graftlm.deltas.base import Delta, Site


def rank(part: Delta) -> int:
    """r, the number of rows of A [r, d_in]."""
    assert isinstance(part.A, Tensor)
    return len(part.A)


def is_lora_at_embedding(site: Site, part: Delta) -> bool:
    """Whether the method started A and B as LoRA does at an embedding: A = 0 and B random, whatever the init is in PEFT
    too. With a random A beside that B, dW would not be zero."""
    return site.kind == "embedding" and isinstance(part.A, nn.Parameter) and not part.A.any()
