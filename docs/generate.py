"""Write the pages that are facts of the code: cli.md, recipe.md, methods.md and recipe.schema.json.

`python docs/generate.py` writes them; with `--check` it fails where one is stale, and says which.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from graftlm.cli import app
from graftlm.config import json_schema
from graftlm.deltas import METHODS
from graftlm.training.recipe import Recipe

HERE = Path(__file__).parent
MADE = "<!-- made by docs/generate.py: do not edit -->\n\n"


def cli() -> str:
    """Every command's help text."""
    command = typer.main.get_command(app)
    return MADE + "# Command line\n\n" + "\n".join(_help(command, "graft", None))


def _help(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name.split()[-1], parent=parent, terminal_width=100)
    yield f"## {name}\n\n```text\n{context.get_help()}\n```\n"
    for child, inner in getattr(command, "commands", {}).items():
        yield from _help(inner, f"{name} {child}", context)


def recipe() -> str:
    """Every key of a recipe: its values, its default and what it means."""
    schema = json.loads(json_schema(Recipe))
    lines = [MADE + "# Recipe\n", "Every key, its values and its default. Unknown keys are errors.\n"]
    lines += ["Editors complete and check recipes with `docs/recipe.schema.json`.\n"]
    sections = {"": schema} | {name: schema["$defs"][name] for name in sorted(schema["$defs"])}
    for name, section in sections.items():
        lines.append(f"## {name or 'the recipe'}\n\n| key | values | default | |\n|---|---|---|---|")
        for key, field in section["properties"].items():
            needed = key in section.get("required", ())
            default = "needed" if needed else f"`{json.dumps(field['default'])}`" if "default" in field else ""
            meaning = " ".join(field.get("description", "").split())
            lines.append(f"| `{key}` | {_values(field)} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _values(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_values(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return " ".join([field.get("type", "mapping"), ", ".join(limits)]).strip()


def methods() -> str:
    """The table of methods."""
    lines = [
        MADE + "# Methods\n",
        "| name | family | paper | trainable parameters a layer | mergeable | factors | in PEFT |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        delta = method.delta
        facts = (delta.family, delta.paper, f"`{delta.formula}`", method.mergeable, method.has_factors)
        peft = delta.peft.type if delta.peft else "-"
        lines.append(f"| `{name}` | " + " | ".join(map(str, facts)) + f" | {peft} |")
    return "\n".join(lines).replace("True", "yes").replace("False", "no") + "\n"


PAGES = {
    "cli.md": cli,
    "recipe.md": recipe,
    "methods.md": methods,
    "recipe.schema.json": lambda: json_schema(Recipe),
}


def main() -> None:
    stale = []
    for name, make in PAGES.items():
        text = make()
        file = HERE / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                file.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}. Run `make docs` and commit what it writes")
    print(f"{'stale' if stale else 'fresh'}: {', '.join(stale or PAGES)}")


if __name__ == "__main__":
    main()
