"""POST /tokenize and /detokenize, as vLLM has them: the ids that a model reads."""

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graftlm.serve.catalog import Opened
from graftlm.serve.completions import ids_of
from graftlm.serve.errors import invalid
from graftlm.serve.http import ADAPTER
from graftlm.serve.limits import read_object
from graftlm.serve.protocol import DetokenizeRequest, TokenizeRequest, read
from graftlm.serve.runs import Service
from graftlm.serve.talk import messages_of, tools_of


async def tokenize(service: Service, request: Request) -> Response:
    body = read(TokenizeRequest, await read_object(request, service.limits))
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt, a text, or messages", "prompt")
    return await _answer(service, body.model, partial(_tokenized, body, service.catalog.context))


def _tokenized(body: TokenizeRequest, context: int | None, opened: Opened) -> dict[str, Any]:
    renderer = opened.renderer
    if body.messages is not None:
        ids = renderer.prompt_of_strangers(messages_of(body.messages), tools_of(body.tools)).tolist()
    else:
        ids = list(renderer.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])
    found = {"tokens": ids, "count": len(ids), "max_model_len": context}
    return found | ({"token_strs": renderer.token_texts(ids)} if body.return_token_strs else {})


async def detokenize(service: Service, request: Request) -> Response:
    body = read(DetokenizeRequest, await read_object(request, service.limits))

    def text(opened: Opened) -> dict[str, Any]:
        ids = ids_of(body.tokens, opened, "tokens")
        return {"prompt": opened.renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)}

    return await _answer(service, body.model, text)


async def _answer(service: Service, model: str, work: Any) -> Response:
    service.enter(1)
    answer, tag = await service.in_thread(partial(with_opened, service, model, work), leave=1)
    return JSONResponse(answer, headers={ADAPTER: tag})


def with_opened(service: Service, model: str, work: Any) -> tuple[dict[str, Any], str]:
    """What `work` makes of a model, and the tag of the model; in a thread."""
    with service.catalog.open(model, service.limits.timeout) as opened:
        return work(opened), opened.tag
