"""The command line's page, out of the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from corollary.cli.main import app

INTRODUCTION = """# Command line

`corollary` has one command for each thing you do with the catalogue. Every command takes `--json FILE` (`-` is standard
output). The exit status is 0 when everything ran, 1 when an exact check failed or something could not run, and 2 on bad usage.

Long runs show progress. Interrupt them at will: finished trials are kept in `.corollary/`, and the same command goes on from
there.
"""


def command_line_page() -> str:
    """Each command with its usage, what it does, and its options."""
    group: Any = typer.main.get_command(app)
    parts = [INTRODUCTION]
    for name, command in group.commands.items():
        context = command.context_class(command, info_name=f"corollary {name}")
        usage = command.get_usage(context).removeprefix("Usage: ")
        parts.append(f"## {name}\n\n{command.help}\n\n```text\n{usage}\n```\n")
        records = [record for p in command.params if (record := p.get_help_record(context))]
        if records:
            rows = "\n".join(
                f"| `{option}` | {words.replace('|', '/').replace('[', chr(92) + '[')} |" for option, words in records
            )
            parts.append(f"| Argument or option | |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)
