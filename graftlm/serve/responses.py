"""POST /v1/responses: OpenAI's newer protocol, as a translation to and from the chat core. Nothing is stored."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from graftlm.serve.errors import ApiError, invalid
from graftlm.serve.http import respond
from graftlm.serve.limits import read_object
from graftlm.serve.protocol import ResponsesRequest, read
from graftlm.serve.response_events import Items
from graftlm.serve.runs import Run, Service, Wanted
from graftlm.serve.sampling import grammar_of, sampling_of
from graftlm.serve.sse import event
from graftlm.serve.talk import Talk, begin, grammar_for, messages_of, pieces, text_of, tools_of, variables_of

Tree = dict[str, Any]


async def handle(service: Service, request: Request) -> Response:
    body = read(ResponsesRequest, await read_object(request, service.limits))
    talk = talk_of(body)
    return await respond(
        service,
        request,
        lambda: begin(service, talk),
        lambda run: ResponsesFormat(run, body, talk),
        stream=bool(body.stream),
    )


def talk_of(body: ResponsesRequest) -> Talk:
    """The request as the chat core has it."""
    trees: list[Tree] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        _add(trees, item, f"input[{number}]")
    tools = tools_of([_tool(tool, number) for number, tool in enumerate(body.tools or [])])
    form = grammar_of((body.text or {}).get("format"), "text.format")
    parallel = body.parallel_tool_calls is not False
    grammar = grammar_for(form, body.tool_choice, tools, field="text", parallel=parallel)
    offered = () if body.tool_choice == "none" else tools
    wanted = Wanted(body.model, body.max_output_tokens, sampling_of(body), grammar=grammar, tools=bool(offered))
    variables = variables_of(None, (body.reasoning or {}).get("effort"))
    return Talk(wanted, messages_of(trees), offered, variables)


def _tool(tool: Tree, number: int) -> Tree:
    if tool.get("type") != "function":
        raise invalid(f"tools[{number}]: {tool.get('type')!r:.60} is no tool of this server, function is", "tools")
    return {"type": "function", "function": {key: tool[key] for key in FUNCTION if tool.get(key) is not None}}


TEXTS = ("input_text", "output_text", "text")
"""Types of parts that are text."""

FUNCTION = ("name", "description", "parameters")


def _add(trees: list[Tree], item: Mapping[str, Any], where: str) -> None:
    """Add an item of the input to the messages. Thoughts and calls belong to the assistant's message around them."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        text = text_of(item.get("content"), f"{where}.content", TEXTS)
        last = trees[-1] if trees else {}
        if role == "assistant" and last.get("role") == "assistant" and not last["content"] and "tool_calls" not in last:
            last["content"] = text  # its thoughts came before
        else:
            trees.append({"role": role, "content": text})
    elif kind == "reasoning":
        _assistant(trees)["reasoning_content"] = _thought(item.get("content") or [], f"{where}.content")
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _assistant(trees).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = text_of(item.get("output"), f"{where}.output", TEXTS)
        trees.append({"role": "tool", "content": text, "tool_call_id": item.get("call_id")})
    else:
        raise invalid(f"{where}: items of the type {kind!r:.60} are not supported", "input")


def _assistant(trees: list[Tree]) -> Tree:
    if not trees or trees[-1]["role"] != "assistant":
        trees.append({"role": "assistant", "content": ""})
    return trees[-1]


def _thought(content: Any, where: str) -> str:
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise invalid(f"{where} must be a list of parts", where)
    texts = [part.get("text") or "" for part in content]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise invalid(f"{where} has the text {wrong[0]!r:.60}, which is none", where)
    return "".join(texts)


class ResponsesFormat:
    """Answers in the form of /v1/responses."""

    def __init__(self, run: Run, body: ResponsesRequest, talk: Talk) -> None:
        self.run, self.body, self.talk = run, body, talk
        self.id = f"resp_{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.prompt_tokens = sum(map(len, run.prompts))

    def _response(self, status: str, output: Sequence[Tree], usage: Tree | None, **more: Any) -> Tree:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": body.model,
            "output": list(output),
            "usage": usage,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            **more,
        }

    def _ended(self, items: Items, finish: str) -> Tree:
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": items.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + items.tokens,
        }
        if finish == "length":
            details = {"reason": "max_output_tokens"}
            return self._response("incomplete", items.output, usage, incomplete_details=details)
        return self._response("completed", items.output, usage)

    async def whole(self) -> Tree:
        items, finish = Items(), ""
        async for piece in pieces(self.run, self.talk):
            items.take(piece)
            finish = piece.finish or finish
        items.end()
        return self._ended(items, finish)

    async def events(self) -> AsyncIterator[bytes]:
        items, number = Items(), 0

        def numbered(found: Sequence[Tree]) -> list[bytes]:
            nonlocal number
            made = [event({**each, "sequence_number": number + n}, each["type"]) for n, each in enumerate(found)]
            number += len(found)
            return made

        started = self._response("in_progress", [], None)
        try:
            for kind in ("response.created", "response.in_progress"):
                yield numbered([{"type": kind, "response": started}])[0]
            async for piece in pieces(self.run, self.talk):
                found = items.take(piece)
                if piece.finish is not None:
                    found += items.end()
                    ended = self._ended(items, piece.finish)
                    found.append({"type": f"response.{ended['status']}", "response": ended})
                for each in numbered(found):
                    yield each
        except ApiError as error:
            failed = self._response("failed", items.output, None, error={"code": error.code, "message": error.message})
            yield numbered([{"type": "response.failed", "response": failed}])[0]
