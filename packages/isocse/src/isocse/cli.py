"""The command `isocse`."""

from __future__ import annotations

import typer

from shared_core import command

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """See what contrastive learning does to an embedding space."""


def main() -> None:
    """Run the command."""
    command.run(app)
