"""What commands and options were called before: the old spelling is wrong usage, answered with the new one."""

from typing import Any

from typer.core import TyperGroup

COMMANDS = {"plan": "estimate"}
OPTIONS = {
    ("train", "--probe-lr"): "`graft lr-range RECIPE`",
    **{(command, "--store"): "`--dtype` or `--quantization`" for command in ("generate", "chat")},
    **{(command, "--store"): "`--base-dtype` or `--quantization`" for command in ("merge", "export")},
}
"""(command, option) -> what does it now."""


class RenamedGroup(TyperGroup):
    """A group of commands that knows their old names."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        command, *others = args
        if command in COMMANDS:
            ctx.fail(f"unknown command {command}: it is {COMMANDS[command]} now")
        for (owner, option), now in OPTIONS.items():
            if command == owner and option in (each.partition("=")[0] for each in others):
                ctx.fail(f"unknown option {option}: it is {now} now")
        return super().resolve_command(ctx, args)
