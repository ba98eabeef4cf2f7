"""The command `asymaffinity`."""

from __future__ import annotations

import typer

from shared_core import command

app = typer.Typer(
    help="Instance masks learned from boxes, with colour and depth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0 and 2 (bad input)."""
    command.run(app)
