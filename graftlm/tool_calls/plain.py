"""Tools for a chat template that has no place for them: their list, calls and results as plain text.

The first message tells what tools there are and that a call is a JSON object (`formats.PLAIN`); earlier calls are
written so, and what tools returned is said by the user.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

from graftlm.data.sources.messages import Fields, Message

INSTRUCTION = """\
You can call these tools:
{tools}
To call one, answer with nothing but {{"name": NAME, "arguments": {{...}}}}, and with a line for each to call several. \
What they return comes in the next message. Otherwise answer as usual."""


def said_plainly(messages: Sequence[Message], tools: Sequence[Fields]) -> list[Message]:
    """The messages with tools, calls and results in their texts. The list of tools stands at the end of a system
    message, else before the first message: no role comes that was not there, and users and assistants take turns."""
    listed = INSTRUCTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    found: list[Message] = []
    for message in messages:
        if message.role == "tool":
            name = message.name or _name_of(message.call_id, messages)
            message = Message("user", f"{name or 'The tool'} returned:\n{message.content}")
        elif message.tool_calls:
            calls = [json.dumps(_call(call), ensure_ascii=False) for call in message.tool_calls]
            text = "\n".join([message.content, *calls] if message.content else calls)
            message = replace(message, content=text, tool_calls=())
        if found and found[-1].role == message.role == "user":
            found[-1] = replace(found[-1], content=f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(message)
    first = found[0]
    parts = (first.content, listed) if first.role == "system" else (listed, first.content)
    return [replace(first, content="\n\n".join(part for part in parts if part)), *found[1:]]


def _name_of(call_id: str, messages: Sequence[Message]) -> str:
    """Of the tool that a call with this id called."""
    calls = (call for message in messages for call in message.tool_calls)
    return next((str(call["function"]["name"]) for call in calls if call_id and call.get("id") == call_id), "")


def _call(call: Fields) -> Fields:
    arguments = call["function"].get("arguments") or {}
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"name": call["function"]["name"], "arguments": given}
