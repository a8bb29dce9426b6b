"""POST /v1/embeddings: the mean of the last hidden states of a text, of length 1."""

import base64
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graftlm.errors import GraftError
from graftlm.routing.embedding import embedding
from graftlm.serve.completions import ids_of, inputs_of
from graftlm.serve.errors import from_graft, invalid
from graftlm.serve.http import ADAPTER
from graftlm.serve.limits import read_object
from graftlm.serve.protocol import EmbeddingRequest, read
from graftlm.serve.runs import Service
from graftlm.serve.sse import while_connected


async def handle(service: Service, request: Request) -> Response:
    body = read(EmbeddingRequest, await read_object(request, service.limits))
    inputs = inputs_of(body.input, "input")
    if len(inputs) > service.limits.inputs:
        raise invalid(f"{len(inputs)} inputs are more than {service.limits.inputs}", "input")
    service.enter(1)
    work = service.in_thread(partial(_embed, service, body, inputs), leave=1)
    answer, tag = await while_connected(request, work)
    return JSONResponse(answer, headers={ADAPTER: tag})


def _embed(service: Service, body: EmbeddingRequest, inputs: Sequence[str | list[int]]) -> tuple[dict[str, Any], str]:
    """In a thread."""
    catalog = service.catalog
    size = catalog.model.config.get_text_config().hidden_size
    if body.dimensions not in (None, size):
        raise invalid(f"dimensions: this model has {size}", "dimensions")
    with catalog.open(body.model, service.limits.timeout) as opened:
        prompts = [ids_of(one, opened, "input") for one in inputs]
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise invalid("an input is empty", "input")
        if catalog.context is not None and longest > catalog.context:
            raise invalid(
                f"an input has {longest:,} tokens, and the context of this model is {catalog.context:,} tokens",
                "input",
                "context_length_exceeded",
            )
        try:
            vectors = [embedding(catalog.model, ids, opened.lease.adapters).tolist() for ids in prompts]
        except GraftError as error:
            raise from_graft(error, "model") from None
        tag = opened.tag
    service.metrics.prompt_tokens.inc(sum(map(len, prompts)))
    data = [
        {"object": "embedding", "index": number, "embedding": _written(vector, body.encoding_format)}
        for number, vector in enumerate(vectors)
    ]
    total = sum(map(len, prompts))
    usage = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}, tag


def _written(vector: list[float], form: str | None) -> Any:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector
