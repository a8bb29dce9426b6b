"""The output of /v1/responses: items (thoughts, a message, calls of tools), and the events that tell of them."""

import secrets
from typing import Any

from graftlm.serve.talk import Piece

Tree = dict[str, Any]

PARTS = {"message": ("output_text", "response.output_text"), "reasoning": ("reasoning_text", "response.reasoning_text")}
"""Type of an item -> the type of its part, and what its events begin with."""


class Items:
    """The items of one answer as they come; the last one is open."""

    def __init__(self) -> None:
        self.output: list[Tree] = []
        self.tokens = 0
        self._open = ""

    def take(self, piece: Piece) -> list[Tree]:
        """The events of a piece."""
        self.tokens += len(piece.tokens)
        found: list[Tree] = []
        if piece.part.thought:
            found += self._text("reasoning", piece.part.thought)
        if piece.part.text:
            found += self._text("message", piece.part.text)
        if piece.part.call is not None:
            found += [*self.end(), *self._call(piece.part.call)]
        return found

    def _text(self, kind: str, text: str) -> list[Tree]:
        found = [] if self._open == kind else [*self.end(), *self._begin(kind)]
        item = self.output[-1]
        item["content"][0]["text"] += text
        delta = self._at({"type": f"{PARTS[kind][1]}.delta", "delta": text}, item)
        return [*found, delta | ({"logprobs": []} if kind == "message" else {})]

    def _begin(self, kind: str) -> list[Tree]:
        self._open = kind
        item: Tree
        part: Tree = {"type": PARTS[kind][0], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item = {"id": f"msg_{secrets.token_hex(8)}", "type": kind, "role": "assistant", "status": "in_progress"}
        else:
            item = {"id": f"rs_{secrets.token_hex(8)}", "type": kind, "summary": [], "status": "in_progress"}
        self.output.append(item)
        added = {"type": "response.output_item.added", "output_index": len(self.output) - 1}
        begun = {**added, "item": {**item, "content": []}}
        item["content"] = [part]
        return [begun, self._at({"type": "response.content_part.added", "part": dict(part)}, item)]

    def _call(self, call: Any) -> list[Tree]:
        item = {
            "id": f"fc_{secrets.token_hex(8)}",
            "type": "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": call["name"],
            "arguments": call["arguments"],
        }
        self.output.append(item)
        at = {"item_id": item["id"], "output_index": len(self.output) - 1}
        begun = {**item, "status": "in_progress", "arguments": ""}
        return [
            {"type": "response.output_item.added", "output_index": at["output_index"], "item": begun},
            {"type": "response.function_call_arguments.delta", **at, "delta": call["arguments"]},
            {
                "type": "response.function_call_arguments.done",
                **at,
                "name": call["name"],
                "arguments": call["arguments"],
            },
            {"type": "response.output_item.done", "output_index": at["output_index"], "item": item},
        ]

    def end(self) -> list[Tree]:
        """The events that close the open item."""
        if not self._open:
            return []
        item, kind, self._open = self.output[-1], self._open, ""
        item["status"] = "completed"
        part = item["content"][0]
        text = self._at({"type": f"{PARTS[kind][1]}.done", "text": part["text"]}, item)
        return [
            text | ({"logprobs": []} if kind == "message" else {}),
            self._at({"type": "response.content_part.done", "part": part}, item),
            {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": item},
        ]

    def _at(self, found: Tree, item: Tree) -> Tree:
        return {**found, "item_id": item["id"], "output_index": len(self.output) - 1, "content_index": 0}
