"""`graft env`."""

from graftlm.cli.options import JsonOption
from graftlm.cli.terminal import print_json


def env(as_json: JsonOption = False) -> None:
    """Print the facts for a bug report: versions, hardware, compiler and cache."""
    from graftlm import environment

    found = environment.environment()
    if as_json:
        print_json(found)
    else:
        print("\n".join(environment.lines(found)))
