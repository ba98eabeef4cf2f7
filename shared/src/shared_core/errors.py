"""Errors that say in one line what would be right: bad input, a missing extra, a training that diverged."""

import enum
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class _Unset(enum.Enum):
    UNSET = enum.auto()  # an enum member stays the same object when an error crosses a process


_UNSET = _Unset.UNSET
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class InputError(ValueError):
    """Input that a person gave is wrong, and this says in one line what would be right.

    Args:
        message: What is wrong and what would be right.
        file: The file or folder that is wrong.
        field: The field, column, option or argument that is wrong.
        value: The value that was found there.

    Attributes:
        exit_code: What a command exits with, 2; a subclass may have a code of its own.

    >>> str(InputError("expected 2 to 8", file="run.toml", field="bits", value=9))
    'run.toml: bits: expected 2 to 8 (got 9)'
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        field: str | None = None,
        value: object = _UNSET,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else os.fspath(file)
        self.field = field
        self.value = value

    def __str__(self) -> str:
        where = "".join(f"{part}: " for part in (self.file, self.field) if part is not None)
        got = "" if self.value is _UNSET else f" (got {_short.repr(self.value)})"
        return " ".join(line.strip() for line in f"{where}{self.message}{got}".splitlines())


class TrainingDiverged(InputError):
    """A loss or a parameter is not finite."""

    @classmethod
    def at(cls, what: str, lr: float, checkpoint: Path | None = None) -> "TrainingDiverged":
        """Make one.

        Args:
            what: What is not finite, and at which step.
            lr: The learning rate.
            checkpoint: Where the run keeps one; named where it is there.

        >>> str(TrainingDiverged.at("the loss is nan at step 6", 10.0))
        'lr: the loss is nan at step 6: try a lower learning rate (got 10.0)'
        """
        is_kept = checkpoint is not None and checkpoint.exists()
        kept = f"; the last checkpoint is {checkpoint}" if is_kept else ""
        return cls(f"{what}: try a lower learning rate{kept}", field="lr", value=lr)


@contextmanager
def needs_extra(extra: str, package: str = "shared-core") -> Iterator[None]:
    """Turn a missing module, imported inside the block, into an InputError that says what to install.

    Args:
        extra: The extra that brings the module.
        package: The distribution whose extra it is.

    >>> with needs_extra("plot"):
    ...     import not_there
    Traceback (most recent call last):
    shared_core.errors.InputError: not_there is not installed: pip install 'shared-core[plot]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("shared_core", package.replace("-", "_")):
            raise  # a fault of ours, not a missing extra
        raise InputError(f"{error.name} is not installed: pip install '{package}[{extra}]'") from error
