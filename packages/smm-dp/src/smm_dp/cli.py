"""The command: `smm-dp account | calibrate | aggregate | simulate | prove`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shared_core import InputError
from shared_core.command import ProofFolder, Quick, Seeds, folder_to_write, run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Differentially private sums that survive secure aggregation.",
)


class AccountingMode(StrEnum):
    """Which accountant: the published bound, or the certified numeric one of this project."""

    PAPER = "paper"
    NUMERIC = "numeric"


class Neighbours(StrEnum):
    """Which two inputs must look alike."""

    ZERO_OUT = "zero-out"
    REPLACE_ONE = "replace-one"
    ADD_REMOVE = "add-remove"


class Watcher(StrEnum):
    """Against whom the guarantee holds."""

    MODEL_RELEASE = "model-release"
    SERVER = "server"


Delta = Annotated[float, typer.Option(help="delta of (epsilon, delta)")]
Epsilon = Annotated[float, typer.Option(help="privacy budget of all rounds together")]
Rate = Annotated[
    float, typer.Option(help="chance that a participant takes part in a round (Poisson sampling)")
]
Rounds = Annotated[int, typer.Option(help="number of rounds")]
Mode = Annotated[
    AccountingMode, typer.Option(help="accountant; numeric is derived in this project, not peer-reviewed")
]
Adjacent = Annotated[Neighbours, typer.Option(help="which two inputs must look alike")]
Seen = Annotated[Watcher, typer.Option(help="against whom; the server knows who takes part")]
Scale = Annotated[float, typer.Option(help="grid steps per unit of the vectors")]
Norm = Annotated[float, typer.Option(help="L2 norm that vectors are expected to have; c = (scale x norm)^2")]
Out = Annotated[Path, typer.Option(help="folder for results", callback=folder_to_write)]


@app.command()
def account(
    mu: Annotated[float, typer.Option(help="Skellam parameter of the summed noise (variance 2 mu)")],
    clip: Annotated[
        float, typer.Option(help="c: bound of the mixed second moment (paper) or squared norm (numeric)")
    ],
    coordinate_bound: Annotated[float, typer.Option(help="bound of a coordinate after scaling")],
    delta: Delta,
    rate: Rate = 1.0,
    rounds: Rounds = 1,
    accounting: Mode = AccountingMode.PAPER,
    adjacency: Adjacent = Neighbours.ZERO_OUT,
    observer: Seen = Watcher.MODEL_RELEASE,
) -> None:
    """Say what a number of rounds costs."""
    from smm_dp.privacy import Accountant, RoundPrivacy

    kind = RoundPrivacy(clip, mu, coordinate_bound, accounting.value, rate, adjacency.value, observer.value)
    accountant = Accountant()
    accountant.add(kind, rounds)
    spent = accountant.guarantee(delta)
    typer.echo(f"epsilon {spent.epsilon:.6f} at delta {delta:g}, proved by order {spent.order}")
    for sentence in kind.assumptions():
        typer.echo(f"- {sentence}")


@app.command()
def calibrate(
    epsilon: Epsilon,
    delta: Delta,
    dim: Annotated[int, typer.Option(help="length of the vectors")],
    participants: Annotated[int, typer.Option(help="(expected) participants of a round")],
    scale: Scale,
    norm: Norm = 1.0,
    rate: Rate = 1.0,
    rounds: Rounds = 1,
    accounting: Mode = AccountingMode.PAPER,
    bits: Annotated[
        int | None, typer.Option(help="bits a coordinate; the fewest that hold the sum where left out")
    ] = None,
    adjacency: Adjacent = Neighbours.ZERO_OUT,
    observer: Seen = Watcher.MODEL_RELEASE,
) -> None:
    """Find the least noise for a budget, and the bits that hold it."""
    from smm_dp.calibration import calibrate as find
    from smm_dp.calibration import squared_norm

    found = find(
        epsilon,
        delta,
        squared_norm(scale, norm),
        scale,
        rate,
        rounds,
        accounting.value,
        dim=dim,
        participants=participants,
        modulus_bits=bits,
        adjacency=adjacency.value,
        observer=observer.value,
    )
    for name, value in {
        "mu of the sum": f"{found.mu_total:.6g}",
        "mu of each": f"{found.mu_total / participants:.6g}",
        "epsilon": f"{found.guarantee.epsilon:.6f} (order {found.order})",
        "coordinate bound": f"{found.coordinate_bound:g}",
        "noise sd of the sum": f"{found.noise_sd:.6g}",
        "left after clipping": f"{found.shrinkage:.1%}",
        "bits": f"{found.modulus_bits} (expected wrap rate {found.wrap_rate:.2%})",
    }.items():
        typer.echo(f"{name:20} {value}")


@app.command()
def aggregate(
    vectors: Annotated[
        Path, typer.Argument(help="a .npy file or comma-separated text, one row a participant")
    ],
    epsilon: Epsilon,
    delta: Delta,
    scale: Scale,
    out: Out,
    norm: Norm = 1.0,
    bits: Annotated[int | None, typer.Option(help="bits a coordinate")] = None,
    accounting: Mode = AccountingMode.PAPER,
    ledger: Annotated[Path | None, typer.Option(help="privacy ledger to charge (made where missing)")] = None,
    mean: Annotated[bool, typer.Option("--mean/--sum", help="what to release")] = False,
) -> None:
    """Release a private sum or mean of vectors, by secure aggregation in this process."""
    from smm_dp.ledger import BudgetExceeded
    from smm_dp.runner import aggregate_file

    try:
        written = aggregate_file(
            vectors,
            epsilon,
            delta,
            scale,
            norm,
            out,
            bits=bits,
            accounting=accounting.value,
            ledger=ledger,
            mean=mean,
        )
    except BudgetExceeded as error:
        raise InputError(str(error), file=ledger) from error
    for path in written:
        typer.echo(f"written: {path}")


@app.command()
def simulate(
    out: Out,
    epsilon: Epsilon,
    delta: Delta = 1e-4,
    data: Annotated[
        Path | None,
        typer.Option(
            help="folder with MNIST's idx files, torchvision's root of them, a saved Hugging Face "
            "DatasetDict (image, label), or .npz with x_train, y_train, x_test, y_test; scikit-learn's "
            "digits where left out"
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="smm-dp, smm-dp-numeric, skellam, ddgauss, gaussian or none")
    ] = "smm-dp",
    scale: Scale = 16.0,
    bits: Annotated[int, typer.Option(help="bits a coordinate")] = 8,
    rate: Rate = 0.06,
    rounds: Rounds = 100,
    hidden: Annotated[int, typer.Option(help="width of the hidden layer")] = 32,
    lr: Annotated[float, typer.Option(help="of Adam on the averaged gradient")] = 0.01,
    seed: Annotated[int, typer.Option(help="of model, sampling and simulated noise")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in OUT, where there is one; its ledger too")
    ] = False,
) -> None:
    """Train a model on records that are each one participant's (simulated noise: protects nobody)."""
    from smm_dp.training_job import TrainingJob, train

    for line in train(
        TrainingJob(out, data, method, epsilon, delta, scale, bits, rate, rounds, hidden, lr, seed),
        resume,
    ):
        typer.echo(line)


@app.command()
def prove(
    out: ProofFolder = Path("runs/smm-dp"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Prove the method's claims on small data; exit 0 where they hold, 1 where not."""
    from smm_dp.proof import run_proof

    raise typer.Exit(run_proof(out, range(seeds), quick))


def main() -> None:
    """Run the command."""
    run(app)
