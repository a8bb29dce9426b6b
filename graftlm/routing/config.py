"""A router from what a command names: the name of one, or a YAML file with its options.

name: retriever
top_k: 2
rows: {sql: builtin:tasks/sql, parcels: parcels.jsonl}
"""

from pathlib import Path

from graftlm.config.schema import build
from graftlm.config.source import read_tree
from graftlm.config.trees import Key
from graftlm.errors import RecipeError, nearest
from graftlm.routing.base import RouterConfig
from graftlm.routing.routers import ADAPTER_ROUTERS


def read_router(text: str) -> RouterConfig:
    """The config of a router. Raises RecipeError for an unknown name, and for a file that describes none."""
    source, lines = "router", dict[Key, int]()
    tree: dict[str, object] = {"name": text}
    if Path(text).suffix in (".yaml", ".yml"):
        source = text
        tree, lines = read_tree(Path(text))
    name = str(tree.get("name", ""))
    if name not in ADAPTER_ROUTERS:
        raise RecipeError(f"no router {name!r}. {nearest(name, ADAPTER_ROUTERS)}", code="unknown-router")
    return build(ADAPTER_ROUTERS[name].config, tree, source=source, lines=lines)
