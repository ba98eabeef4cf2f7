"""The command `csq`: train, harden, inspect, export and evaluate mixed-precision models, prove the claim."""

from __future__ import annotations

from pathlib import Path

import typer

from csq.cli_models import evaluate, export, harden, inspect
from csq.cli_train import train
from shared_core import command
from shared_core.command import ProofFolder, Quick, Seeds

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

app = typer.Typer(
    help="Mixed-precision quantization grown by bi-level continuous sparsification (CSQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for each in (train, harden, inspect, export, evaluate):
    app.command()(each)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (the claim does not hold) and 2 (bad input)."""
    command.run(app)


@app.command()
def prove(
    out: ProofFolder = Path("runs/csq-quant"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Show on embedded data whether the paper's claims hold; exit code 0 where they do, 1 where not."""
    from csq.proof import prove as run_proof

    raise typer.Exit(run_proof(out, seeds, quick))
