"""What the user of a written model has to know."""

from collections.abc import Mapping
from typing import Any


def export_warnings(result: Mapping[str, Any], dtype: str) -> list[str]:
    """Sentences about what `export` returned: what is different from the model in memory, and by how much."""
    texts = []
    if result.get("untied"):
        texts.append(
            "the output head was tied to the embeddings; a delta sits on one of them, so both are written, untied"
        )
    if (end := result.get("missing_end")) is not None:
        texts.append(
            f"{end['why']}: a server needs it as a stop token of each request (stop_token_ids in vLLM), or use "
            "`graft merge`, which writes it into the model"
        )
    if (shares := result.get("lost_by_quantizing")) is not None:
        texts.append(_quantization(result["base_quantization"], shares))
    if dtype != "float32" and (layers := result.get("lost")):
        (worst, share), (_, middle) = layers[0], layers[len(layers) // 2]
        texts.append(
            f"{dtype} loses {middle:.0%} of the change of the middle layer and {share:.0%} of {worst}, the worst; "
            "--dtype float32 keeps it whole"
        )
    return texts


def _quantization(quantization: str, shares: list[list[Any]] | str) -> str:
    """`shares`: [layer, distance over the size of the change] from the worst layer on, or why that is not known."""
    weights = f"the merged weights are those of the base in {quantization}, plus the change, in float. "
    if isinstance(shares, str):
        return f"{weights}How far they are from the float base plus the change is not known: {shares}"
    if not shares:
        return f"{weights}No layer was changed"
    (worst, share), (middle, middle_share) = shares[0], shares[len(shares) // 2]
    return (
        f"{weights}From the float base plus the change they are {share:.2g} times the change away at {worst}, the "
        f"worst layer, and {middle_share:.2g} times at {middle}, the middle one"
    )
