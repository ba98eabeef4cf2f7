"""Options that the commands share, and their checks. No torch here: help answers at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from csq.settings import MethodName, Settings
from shared_core.command import file_to_write, one_of

METHODS = get_args(MethodName)
DEFAULTS = {field.name: field.default for field in fields(Settings)}


def model_name(value: str | None) -> str | None:
    """Check the form of a model's name."""
    family, _, name = (value or "csq/x").partition("/")
    if not (family in ("csq", "torchvision", "timm") and name) and ":" not in str(value):
        raise typer.BadParameter(
            f"expected csq/resnet20, torchvision/NAME, timm/NAME or module:callable, got {value!r}"
        )
    return value


def setting(name: str, help_: str, known: tuple[str, ...] = (), **more: Any) -> Any:
    """An option whose default is that of `Settings`: None says that it was not given."""
    if known:
        more["callback"] = one_of(*known)
    return typer.Option(help=help_, show_default=str(DEFAULTS[name]), **more)


Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with train/ and test/ (or val/) of class folders, CIFAR's binary files or MNIST's "
        "idx files; or digits, mnist5k."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file, too.", callback=file_to_write())
]
RunOrFile = Annotated[
    Path, typer.Argument(help="Folder of `csq train`, or a file of `csq harden`.", exists=True)
]


def percent(share: float | None) -> str:
    """Return a share as a table shows it; nothing for none."""
    return "" if share is None else f"{100 * share:.2f} %"
