"""The options of the command `relattn`: their types, help, and what is refused at once."""

from pathlib import Path
from typing import Annotated

import typer

from shared_core.command import one_of

# No torch here: help and wrong arguments answer at once.

METHOD_NAMES = (
    "plain", "prefix", "pplm", "bias", "boost", "extract", "relattn", "relattn-online", "relattn-prefix",
)  # fmt: skip
FORMATS = ("jsonl", "csv", "newts", "entsum", "aclsum", "ctrlsum")
NEWTS_CONTROLS = ("words", "phrases", "sentences")


def steering_weight(value: str | None) -> str | None:
    """Refuse all but a number from 0 to 1, and "online"."""
    if value is None or value == "online":
        return value
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise typer.BadParameter(f'expected a number from 0 to 1, or "online", got {value!r}')
    return value


def sharpness(value: str) -> str:
    """Refuse all but a number above 0, and "auto"."""
    try:
        valid = value == "auto" or 0 < float(value) < float("inf")
    except ValueError:
        valid = False
    if not valid:
        raise typer.BadParameter(f'expected a number above 0, or "auto", got {value!r}')
    return value


def share(value: float | None) -> float | None:
    """Refuse all but a number above 0, at most 1."""
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"expected a number above 0, at most 1, got {value}")
    return value


Model = Annotated[str, typer.Option(help="Model directory, or a name that transformers knows.")]
Control = Annotated[list[str], typer.Option(help="What the reader asks for; repeat it for several phrases.")]
WeightOption = Annotated[
    str | None,
    typer.Option(
        help="Steering weight, 0 to 1, or online; 0.12, or the module's, if not given.",
        callback=steering_weight,
    ),
]
Temperature = Annotated[
    str,
    typer.Option(
        help="Sharpness of relevance: 1 is the paper's, auto often steers better.", callback=sharpness
    ),
]
Module = Annotated[
    Path | None, typer.Option(help="Trained module, from `fewshot`.", exists=True, file_okay=False)
]
Beams = Annotated[int | None, typer.Option(min=1, help="Beams; the model's own if not given, else 4.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest summary, in tokens.")]
MinTokens = Annotated[int | None, typer.Option(min=0, help="Shortest summary, in tokens.")]
MaxSource = Annotated[int | None, typer.Option(min=1, help="Longest source, in tokens; the model's limit.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents decoded together.")]
Document = Annotated[
    Path | None, typer.Argument(help="Text file; standard input if not given.", exists=True, dir_okay=False)
]
Data = Annotated[Path | None, typer.Option(help="File, or folder for ctrlsum; none for aclsum.", exists=True)]
Format = Annotated[str, typer.Option(help=", ".join(FORMATS), callback=one_of(*FORMATS))]
Split = Annotated[str, typer.Option(help="Of aclsum and ctrlsum: train, val or test.")]
Articles = Annotated[
    Path | None, typer.Option(help="entsum: folder with the articles' texts.", exists=True, file_okay=False)
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed rows out, with a warning.")]
SourcePrefix = Annotated[
    str, typer.Option(help='What the model wants in front of a document: "summarize: " for T5.')
]
Coarse = Annotated[
    int,
    typer.Option(
        min=1,
        help="Online selection decodes every so many weights first, then only where they differ; 1 decodes"
        " all.",
    ),
]
NewtsControl = Annotated[str, typer.Option(help=", ".join(NEWTS_CONTROLS), callback=one_of(*NEWTS_CONTROLS))]
