"""A file of good rows with damage planted in it: what `load_rows` has to find, line by line.

KINDS are lines that must be left out, NOTED are lines that are kept or hold no row but must be told; each comes with
words that the reason must hold. benchmarks/damaged_rows uses the same file.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any


def turns(*contents: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in contents], **more}


def good(n: int) -> dict[str, Any]:
    """Row n, unlike every other: with and without system, tools, several turns, and odd but right characters."""
    odd = (
        "",
        " \U0001f600",
        " e\u0301",
        " \u05d0\u05d1",
        " line\nbreak",
        " {brace}",
        " <|im_end|>",
        " \u200b ",
        " \ufffd",
    )[n % 9]
    row = turns(("user", f"question {n}{odd}"), ("assistant", f"answer {n}{odd}"))
    if n % 3 == 0:
        row["messages"].insert(0, {"role": "system", "content": "" if n % 2 else "Be brief."})
    if n % 4 == 0:
        row["messages"] += turns(("user", "and then?"), ("assistant", f"then {n}"))["messages"]
    if n % 5 == 0:
        row["tools"] = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
        call = {"id": f"c{n}", "type": "function", "function": {"name": "find", "arguments": f'{{"n": {n}}}'}}
        row["messages"][-1:] = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": f"{n}", "tool_call_id": f"c{n}"},
            row["messages"][-1],
        ]
    if n % 7 == 0:
        row["messages"][-1] |= {"weight": 0.5, "reasoning_content": "hm"}
    return row


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _call(function: dict[str, Any]) -> dict[str, Any]:
    asks = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}
    return {"messages": [{"role": "user", "content": "q"}, asks, {"role": "tool", "content": "1", "tool_call_id": "c"}]}


ASK = ("user", "q")
KINDS: dict[str, tuple[Callable[[int], bytes], str]] = {
    "no JSON": (lambda n: b"{'messages': []}", "not valid JSON: Expecting property name"),
    "a line that is cut off": (lambda n: _line(good(n))[:-9], "cut off"),
    "two objects on a line": (lambda n: _line(good(n)) * 2, "Extra data"),
    "no mapping": (lambda n: b"[1, 2]", "a row is a mapping"),
    "fields of no format": (lambda n: _line({"question": f"{n}"}), "'messages' is needed, found ['question']"),
    "a field that is null": (lambda n: b'{"messages": null}', "'messages' is needed, it is null"),
    "messages as text": (lambda n: b'{"messages": "hello"}', "must be a list of at least one message"),
    "no messages": (lambda n: b'{"messages": []}', "must be a list of at least one message"),
    "a message as text": (lambda n: b'{"messages": ["hello"]}', "a message must be a mapping"),
    "no content": (lambda n: b'{"messages": [{"role": "user"}]}', "'content' is needed, found ['role']"),
    "content that is null": (lambda n: _line(turns(ASK, ("assistant", None))), "'content' is needed, it is null"),
    "content that is a number": (lambda n: _line(turns(ASK, ("assistant", n))), "'content' must be text"),
    "no role": (lambda n: b'{"messages": [{"content": "q"}]}', "'role' is needed"),
    "an unknown role": (lambda n: _line(turns(("wizard", "q"), ("assistant", "a"))), "'wizard', which is no role"),
    "a role in capitals": (lambda n: _line(turns(("User", "q"), ("assistant", "a"))), "Did you mean 'user'"),
    "an empty answer": (lambda n: _line(turns(ASK, ("assistant", ""))), "is empty"),
    "a blank answer": (lambda n: _line(turns(ASK, ("assistant", " \n\t\u00a0"))), "is blank"),
    "an invisible answer": (lambda n: _line(turns(ASK, ("assistant", "\u200b\ufeff\u200d"))), "is blank"),
    "no answer": (lambda n: _line(turns(("system", "s"), ASK)), "no assistant message among"),
    "two questions": (lambda n: _line(turns(ASK, ASK, ("assistant", "a"))), "two questions follow each other"),
    "two answers": (lambda n: _line(turns(ASK, ("assistant", "a"), ("assistant", "b"))), "two answers follow"),
    "a late system message": (lambda n: _line(turns(ASK, ("system", "s"), ("assistant", "a"))), "comes late"),
    "an answer first": (lambda n: _line(turns(("assistant", "a"), ASK)), "begins with an answer"),
    "a NUL character": (lambda n: _line(turns(ASK, ("assistant", "a\0b"))), "contains a NUL character"),
    "a NUL byte": (lambda n: _line(good(n)) + b"\0\0", "contains NUL bytes"),
    "a lone surrogate": (
        lambda n: json.dumps(turns(("user", "\ud800"), ("assistant", "a"))).encode(),
        "lone surrogate",
    ),
    "lost characters": (lambda n: _line(turns(ASK, ("assistant", "caf\ufffd\ufffd"))), "has lost characters"),
    "bytes that are no UTF-8": (lambda n: _line(turns(ASK, ("assistant", "a"))).replace(b"q", b"caf\xe9"), "not UTF-8"),
    "a key twice": (lambda n: b'{"messages": [], "messages": []}', "'messages' is given twice"),
    "NaN": (lambda n: _line(good(n))[:-1] + b', "score": NaN}', "NaN is no JSON value"),
    "nesting without end": (lambda n: b"[" * 100_000, "nested too deeply"),
    "a call without a name": (lambda n: _line(_call({"arguments": "{}"})), "names no function"),
    "arguments that are no JSON": (
        lambda n: _line(_call({"name": "f", "arguments": "{x"})),
        "arguments is not valid JSON",
    ),
    "a result without a call": (
        lambda n: _line(turns(ASK, ("tool", "1"), ("assistant", "a"))),
        "no assistant has called",
    ),
    "a result of another call": (
        lambda n: _line(_call({"name": "f"})).replace(b'"tool_call_id": "c"', b'"tool_call_id": "d"'),
        "'d' is no call that was made",
    ),
    "a weight out of range": (
        lambda n: _line({"messages": [{"role": "user", "content": "q", "weight": -1}]}),
        "weight is -1, out of range",
    ),
    "a weight that is text": (
        lambda n: _line({"messages": [{"role": "user", "content": "q", "weight": "1"}]}),
        "weight must be a number",
    ),
    "nothing with a weight": (
        lambda n: _line(turns(ASK, ("assistant", "a"))).replace(b'"a"}', b'"a", "weight": 0}'),
        "every answer has the weight 0",
    ),
    "a picture": (
        lambda n: _line(turns(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a"))),
        "only text can be trained on",
    ),
    "tools that are no list": (lambda n: _line(good(n) | {"tools": 5}), "tools must be a list"),
}
NOTED: dict[str, tuple[Callable[[int], bytes], str]] = {
    "a blank line": (lambda n: b"  ", "the line is blank"),
    "a question at the end": (
        lambda n: _line({"messages": [*good(n)["messages"], {"role": "user", "content": "and?"}]}),
        "ends with a user message",
    ),
    "a row twice": (lambda n: _line(good(-1)), "says the same as"),
}


def damaged_file(file: Path, rows: int, damaged: int, seed: int = 0) -> dict[int, str]:
    """Write a file of so many lines; returns the kind of each damaged line by its number (from 1). The first line is
    the row that `a row twice` repeats."""
    chance = random.Random(seed)
    kinds = {**KINDS, **NOTED}
    places = sorted(chance.sample(range(2, rows + 1), damaged))
    chosen = [list(kinds)[i % len(kinds)] for i in range(damaged)]
    chance.shuffle(chosen)
    planted = dict(zip(places, chosen, strict=True))
    with file.open("wb") as lines:
        for n in range(1, rows + 1):
            lines.write((kinds[planted[n]][0](n) if n in planted else _line(good(-1 if n == 1 else n))) + b"\n")
    return planted
