"""Plugins: rows for our tables from other distributions, found by their entry points.

    [project.entry-points."graftlm.methods"]        # the group; GROUPS has them all
    hadamard = "graft_hadamard:METHOD"              # the name in a recipe = an object that is a row of the table

A plugin that cannot be used is reported once, and by `graft env`; everything else works without it. A recipe that names
it is refused with the reason.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, get_args, get_type_hints

logger = logging.getLogger(__name__)


class PluginGroup(NamedTuple):
    """A table that plugins add rows to."""

    module: str
    table: str
    key: str
    """The field of a row's config that holds its name, as a Literal."""
    sections: tuple[str, ...]
    """The sections of a recipe that name a row."""


GROUPS = {
    "graftlm.methods": PluginGroup("graftlm.deltas", "METHODS", "method", ("delta", "deltas")),
    "graftlm.losses": PluginGroup("graftlm.losses", "LOSSES", "name", ("loss",)),
    "graftlm.optimizers": PluginGroup("graftlm.optim", "OPTIMIZERS", "name", ("optimizer",)),
    "graftlm.callbacks": PluginGroup("graftlm.callbacks", "CALLBACKS", "name", ("callbacks",)),
    "graftlm.rewards": PluginGroup("graftlm.rl.rewards", "SCORERS", "by", ("rl",)),
    "graftlm.selectors": PluginGroup("graftlm.selection", "SELECTORS", "by", ("select",)),
}
"""Group of entry points -> its table. Tables are imported when there is a plugin for them."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of another distribution, and what became of it."""

    group: str
    name: str
    value: str
    """Where its object is: `module:NAME`."""
    distribution: str
    version: str
    error: str = ""
    """Why it cannot be used; empty where it is in the table."""

    def __str__(self) -> str:
        return f"{self.name} ({self.group}) of {self.distribution} {self.version}"


class PluginError(Exception):
    """An object that is no row of the table, or that has a name which is taken."""


_loaded: dict[str, list[Plugin]] = {}
"""Group -> its plugins, loaded or broken; groups that were never loaded are absent."""
_loading: set[str] = set()


def load_plugins(*groups: str) -> None:
    """Put the plugins of these groups (none: all) into their tables. The second call for a group does nothing.

    Whoever looks a name up, or builds a union of the configs of a table, calls it first. A plugin that cannot be used
    is logged as one warning, with the reason. Raises ImportError where a plugin, while it is imported, imports what
    needs the plugins: it would be missing there.
    """
    new_groups = [group for group in groups or GROUPS if group not in _loaded]
    if not _loading.isdisjoint(new_groups):
        raise ImportError("plugins are being loaded", name=__name__)
    if not new_groups:
        return
    found = entry_points()
    _loading.update(new_groups)
    try:
        for group in new_groups:
            loaded = [_load(group, entry) for entry in sorted(found.select(group=group), key=_place)]
            _loaded[group] = loaded
    finally:
        _loading.difference_update(new_groups)
    for plugin in (plugin for group in new_groups for plugin in _loaded[group] if plugin.error):
        logger.warning("plugin %s is left out: %s", plugin, plugin.error)


def plugins() -> list[Plugin]:
    """Every plugin of this installation with what became of it, loaded now where it was not."""
    load_plugins()
    return [plugin for group in GROUPS for plugin in _loaded[group]]


def why_broken(group: str, name: str) -> str:
    """What is wrong with the plugin of this name, as a sentence; empty where there is none, or nothing is wrong."""
    for plugin in _loaded.get(group, ()):
        if plugin.name == name and plugin.error and name not in _table(group):
            return f"the plugin {plugin} is broken: {plugin.error}"
    return ""


def refuse_broken(section: str, value: object) -> None:
    """Raise ValueError where a section of a recipe names a plugin that is broken, with the reason."""
    for group, about in GROUPS.items():
        if section in about.sections:
            for name in _names(value, about.key):
                if why := why_broken(group, name):
                    raise ValueError(f"{name!r} cannot be used: {why}")


def _names(value: object, key: str) -> Iterator[str]:
    """The names in a section: a name alone, {key: NAME}, or these in a list or under names of the user's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _names(each, key)
    elif isinstance(value, Mapping):
        if isinstance(name := value.get(key), str):
            yield name
        for each in value.values():
            if isinstance(each, Mapping):
                yield from _names(each, key)


def _place(entry: EntryPoint) -> tuple[str, str, str]:
    """The sort key of plugins: of two with one name it is always the same one that is used."""
    return entry.name, "" if entry.dist is None else entry.dist.name, entry.value


def _table(group: str) -> dict[str, Any]:
    about = GROUPS[group]
    table: dict[str, Any] = getattr(import_module(about.module), about.table)
    return table


def _load(group: str, entry: EntryPoint) -> Plugin:
    """Put the row of an entry point into its table, or say why not."""
    dist, error = entry.dist, ""
    try:
        table = _table(group)
        if entry.name in table:
            raise PluginError(f"the name {entry.name!r} is taken by another row of {GROUPS[group].table}")
        row = entry.load()
        _check(row, entry.name, type(next(iter(table.values()))), GROUPS[group].key)
        table[entry.name] = row
    except PluginError as found:
        error = str(found)
    except (Exception, SystemExit) as found:  # whatever another package does when it is imported
        error = f"{type(found).__name__}: {found}".partition("\n")[0]
        if isinstance(found, ImportError) and (found.name or "").startswith("graftlm."):
            error += ". A plugin imports only what is below graftlm.recipe"
    name, version = ("?", "?") if dist is None else (dist.name, dist.version)
    return Plugin(group, entry.name, entry.value, name, version, error)


def _check(row: Any, name: str, kind: type, key: str) -> None:
    """Raise PluginError for what is no row of a table, or has another name than the entry point."""
    home = f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(row, kind):
        what = f"the class {row.__qualname__}" if isinstance(row, type) else f"a {type(row).__qualname__}"
        raise PluginError(f"its object must be a {home}, this is {what}")
    config: Any = getattr(row, "config", None)
    (base,) = get_args(get_type_hints(kind)["config"])
    if not (isinstance(config, type) and issubclass(config, base) and is_dataclass(config)):
        raise PluginError(f"its config must be a {base.__module__}.{base.__qualname__} under @config, not {config!r}")
    names = get_args(get_type_hints(config)[key])
    if names != (name,):
        says = f"Literal{list(names)}" if names else "no Literal"
        raise PluginError(f"its config has {key}: {says}, and the entry point is called {name!r}: give both one name")
