"""How every command ends: one line and exit code 2 for bad input, a traceback and 70 for a fault of ours."""

import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import typer
import typer.main

from shared_core.errors import InputError
from shared_core.files import check_writable

if TYPE_CHECKING:
    from rich.table import Table

BAD_INPUT = 2
INTERNAL_FAULT = 70  # sysexits.h EX_SOFTWARE; 1 means "the claim does not hold"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_ACCELERATE = "ACCELERATE_TORCH_DEVICE"

# Newer typer releases carry a click of their own, so the class is taken from typer and not from click.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def folder_to_write(value: Path | None) -> Path | None:
    """Be the callback of an option that names a folder: one that cannot be made is told before the work.

    Nothing is made here: other options may be wrong.
    """
    if value is not None:
        nearest = next(place for place in (value, *value.absolute().parents) if place.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(
                f"cannot be written: {nearest} is not a folder that one may write to", file=value
            )
    return value


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")]
"""`--device`, whose default is auto; for `usable_device`."""
ProofFolder = Annotated[
    Path, typer.Option(help="Folder for proof.json and pictures.", callback=folder_to_write)
]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds.")]
Quick = Annotated[bool, typer.Option("--quick", help="A shortened run: shows that all works, not the claim.")]
"""`--out`, `--seeds` and `--quick` of `prove`."""

# Errors that a wrong path from the command line gives.
_PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a Typer app and exit with the house's codes.

    ====  ==========================================================================================
    0     the command ended
    n     the command returned the integer n or raised `typer.Exit(n)` (`prove`: 1, a claim does not hold)
    2     bad input: InputError, wrong option, unusable path; stderr has one line, ``error: ...``
          (a subclass of InputError may have another `exit_code`)
    70    a fault of ours; stderr has the traceback (without the values of local variables)
    130   interrupted by Ctrl-C, or a question was declined
    ====  ==========================================================================================

    ``--debug`` anywhere on the command line (before ``--``) shows the traceback of bad input too; the
    app itself does not see it.

    Args:
        app: The app.
        argv: The arguments after the program's name; `sys.argv[1:]` where None.
    """
    arguments, debug = _split_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        command = typer.main.get_command(app)
        _document_debug(command)
        result = command.main(args=arguments, standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help page
            error.show()
            sys.exit(BAD_INPUT)
        _fail(error.format_message(), debug)
    except InputError as error:
        _fail(str(error), debug, error.exit_code)
    except _PATH_ERRORS as error:
        if error.filename is None:
            _crash()
        _fail(f"{error.filename}: {error.strerror}", debug)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted", debug)
        sys.exit(INTERRUPTED)
    except Exception:
        _crash()
    code = result if type(result) is int else 0
    if code == INTERRUPTED:  # newer typer releases return it where older ones raise Abort
        _say("interrupted", debug=False)
    sys.exit(code)


def _split_debug(arguments: list[str]) -> tuple[list[str], bool]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = arguments[:end]
    return [option for option in options if option != "--debug"] + arguments[end:], "--debug" in options


def _document_debug(command: object) -> None:
    if getattr(command, "epilog", None) is None:
        setattr(command, "epilog", "--debug, anywhere: show the traceback of an error.")  # noqa: B010
    for child in getattr(command, "commands", {}).values():
        _document_debug(child)


def _say(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _fail(message: str, debug: bool, code: int = BAD_INPUT) -> NoReturn:
    _say(message, debug)
    sys.exit(code)


def _crash() -> NoReturn:
    traceback.print_exc()
    sys.exit(INTERNAL_FAULT)


def file_to_write(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """Return a callback for an option that names a file to write: what cannot be is told before the work.

    Args:
        suffixes: The ends that its name may have (".onnx"); any where none are given.
    """

    def check(value: Path | None) -> Path | None:
        if value is not None:
            if suffixes and value.suffix not in suffixes:
                ends = " or ".join(suffixes)
                raise typer.BadParameter(f"expected a file name that ends in {ends}, got {value}")
            check_writable(value)
        return value

    return check


def one_of(*known: str) -> Callable[[Any], Any]:
    """Return a callback for an option that takes one of these words, or several of them."""

    def check(value: Any) -> Any:
        for word in value if isinstance(value, list) else [value]:
            if word is not None and word not in known:
                raise typer.BadParameter(f"expected one of {', '.join(known)}, got {word!r}")
        return value

    return check


def above_zero(value: Any) -> Any:
    """Be the callback of an option that takes a finite number above 0, or several."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not 0 < number < math.inf:
            raise typer.BadParameter(f"expected a number above 0, got {number}")
    return value


def with_commas(value: str | None) -> str | None:
    """Be the callback of an option that takes finite numbers with commas between."""
    try:
        if not all(math.isfinite(float(part)) for part in (value or "0").split(",")):
            raise ValueError(value)
    except ValueError as error:
        raise typer.BadParameter(
            f"expected numbers with commas between, as 0.5,0.5,0.5; got {value!r}"
        ) from error
    return value


def assigned(texts: Sequence[str], settings: type) -> dict[str, Any]:
    """Read the values of ``--set NAME=VALUE`` as fields of a dataclass with plain values.

    Numbers and words stand for themselves, true and false for bools, ``1,2`` for a tuple, none for None.

    Args:
        texts: One each.
        settings: The dataclass, with fields of int, float, bool, str, Literal, tuples of numbers, or None.

    Raises:
        InputError: A name is no field, or a value is of another kind.

    >>> import dataclasses
    >>> @dataclasses.dataclass
    ... class Settings:
    ...     lr: float = 0.1
    ...     sizes: tuple[int, ...] = (320,)
    ...     flip: bool = True
    ...     warmup: int | None = 10
    >>> assigned(["lr=1e-3", "sizes=320,352", "flip=false", "warmup=none"], Settings)
    {'lr': 0.001, 'sizes': (320, 352), 'flip': False, 'warmup': None}
    """
    kinds = get_type_hints(settings)
    made: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds:
            raise InputError(f"expected NAME=VALUE with one of {', '.join(kinds)}", field="set", value=text)
        kind = kinds[name]
        try:
            made[name] = _plain(kind, value)
        except (KeyError, ValueError) as error:
            named = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
            raise InputError(f"expected {named}", field=name, value=value) from error
    return made


def _plain(kind: Any, text: str) -> Any:
    inner = get_args(kind)
    if type(None) in inner:
        (other,) = (one for one in inner if one is not type(None))
        return None if text.lower() == "none" else _plain(other, text)
    if get_origin(kind) is tuple:
        parts = text.removesuffix(",").split(",") if text else []
        kinds = inner[:1] * len(parts) if Ellipsis in inner else inner
        return tuple(_plain(one, part) for one, part in zip(kinds, parts, strict=True))
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind in (int, float):
        return kind(text)
    if kind is str or get_origin(kind) is Literal:
        return text
    raise TypeError(f"no text stands for {kind}")


def main_process() -> bool:
    """Whether this is the first process of a launch (torchrun, accelerate): the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr, in the first process; call it with what is done, and with a loss."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("{task.fields[note]}")
    with Progress(*columns, note, console=Console(stderr=True), disable=not main_process()) as bar:
        task = bar.add_task(what, total=total, note="")

        def update(done: int, loss: float = math.nan) -> None:
            bar.update(task, completed=done, note="" if math.isnan(loss) else f"loss {loss:.3f}")

        yield update


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show warnings that are for the user as one line each on stderr, without the place in the code."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def print_table(table: "Table") -> None:
    """Print a table on stdout: as wide as the terminal, and whole into a pipe, which has no width."""
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


@contextmanager
def accelerate_device(name: str) -> Iterator[None]:
    """Make an `Accelerator` that is made inside the block take a device with a number, such as cuda:1.

    Accelerate takes one from the environment alone; without a number it chooses, in several processes too.
    """
    before = os.environ.get(_ACCELERATE)
    if ":" in name:
        os.environ[_ACCELERATE] = name
    try:
        yield
    finally:
        if ":" in name:
            del os.environ[_ACCELERATE]
        if before is not None:
            os.environ[_ACCELERATE] = before


def usable_device(name: str) -> str:
    """Return the name of a torch device that works here; `auto` is the first GPU, or else the CPU.

    Raises:
        InputError: There is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"no such device here ({str(error).splitlines()[0]})", field="device", value=name
        ) from error
    return name
