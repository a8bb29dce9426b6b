"""Variables of a chat template, such as `enable_thinking`, that a recipe sets for good."""

import re
from collections.abc import Mapping
from typing import Any

from graftlm.errors import nearest

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that rendering sets itself."""


def names_in(source: str) -> frozenset[str]:
    """All names in a template; a variable that is none of them is not read."""
    return frozenset(re.findall(r"[^\W\d]\w*", source))


def with_variables(source: str, variables: Mapping[str, Any]) -> str:
    """The template with these variables set at its beginning, unless whoever renders it sets them.

    So whatever has the template has them too: training, generation, the adapter's folder and every server.
    """
    lines = (f"{{% set {name} = {name} | default({value!r}) %}}\n" for name, value in variables.items())
    return "".join(lines) + source


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no name of a variable or one that rendering sets itself, and for what JSON has no
    value for."""
    for name, value in variables.items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a variable")
        if name in RESERVED:
            raise ValueError(f"{name!r} is set by rendering itself: a row has its messages and its tools")
        if (odd := _odd(value)) is not None:
            raise ValueError(f"{name} is a {type(odd).__name__}: write it as text, in quotes")


def _odd(value: Any) -> Any:
    """What stands in the value that JSON has no word for; None where nothing does."""
    if isinstance(value, Mapping):
        return next((odd for odd in map(_odd, [*value, *value.values()]) if odd is not None), None)
    if isinstance(value, list | tuple):
        return next((odd for odd in map(_odd, value) if odd is not None), None)
    return None if value is None or isinstance(value, bool | int | float | str) else value


def checked_with_variables(source: str, variables: Mapping[str, Any]) -> str:
    """`with_variables`; raises ValueError for a variable that is none, or that the template does not read."""
    check_variables(variables)
    names = names_in(source)
    for name in variables:
        if name not in names:
            raise ValueError(f"the chat template does not read {name!r}. {nearest(name, names)}")
    return with_variables(source, variables)
