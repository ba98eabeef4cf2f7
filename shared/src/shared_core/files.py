"""Atomic files: a reader sees the old file or the new one, never a part, also when the writer is killed."""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shared_core.errors import InputError


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `target` that becomes `target` when the block ends without an exception.

    The temporary file exists (empty) and has the target's suffix, because many writers choose their format by
    it. A new file gets the permissions that `open` would give it, a replaced one keeps its own. A symbolic
    link stays a link: the file it points to is replaced. When the block raises, the temporary file is removed
    and the target is left as it was.

    Args:
        target: The file to write. Its folder must exist.

    Raises:
        InputError: The folder is missing or cannot be written to, or the target is a folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_path(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("whole")
    ...     Path(folder, "a.txt").read_text()
    'whole'
    """
    final, temporary = _begin(target)
    try:
        mode = (final if final.exists() else temporary).stat().st_mode & 0o7777
        yield temporary
        temporary.chmod(mode)  # the block may have replaced the file by one of its own making
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _begin(target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that will be written, and the temporary one beside it, which is there now."""
    final = Path(os.path.realpath(target))
    if final.is_dir():
        raise InputError("is a folder, expected the name of a file", file=target)
    suffix = final.suffix if len(final.suffix) <= 32 else ""
    temporary = final.with_name(f".{final.stem[:32]}.{secrets.token_hex(6)}{suffix}")
    try:
        temporary.touch(exist_ok=False)
    except FileNotFoundError as error:
        raise InputError(f"cannot be written: there is no folder {final.parent}", file=target) from error
    except NotADirectoryError as error:
        raise InputError(f"cannot be written: {final.parent} is not a folder", file=target) from error
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror} in {final.parent}", file=target) from error
    return final, temporary


def check_writable(target: str | os.PathLike[str]) -> None:
    """Raise before long work what `atomic_path` would raise after it; nothing is left behind."""
    _begin(target)[1].unlink()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and those above it, where they are missing.

    Raises:
        InputError: It cannot be made, or is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder cannot be made: {error.strerror}", file=folder) from error
    return folder


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, atomically. Errors as for `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with newlines as they are, atomically. Errors as for `atomic_path`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `obj` to `path` as JSON (insertion order, two spaces), atomically; NumPy numbers and arrays too.

    Raises:
        ValueError: A number is NaN or infinite, which JSON has no word for; the message says where it stands.
        TypeError: An object has no JSON form.
        InputError: As for `atomic_path`.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        place = next(_not_finite(obj, "$"), None)
        raise (ValueError(f"{place}, which JSON cannot hold") if place else error) from error
    write_text(path, text + "\n")


def _plain(obj: object) -> object:
    import numpy as np  # here: a command that only says what is wrong does without

    if isinstance(obj, np.ndarray | np.generic):
        return obj.tolist()
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


def _not_finite(obj: object, place: str) -> Iterator[str]:
    import numpy as np

    if isinstance(obj, np.ndarray | np.generic):
        obj = obj.tolist()
    if isinstance(obj, float) and not math.isfinite(obj):
        yield f"{place} is {obj}"
    elif isinstance(obj, Mapping):
        for key, value in obj.items():
            yield from _not_finite(value, f"{place}.{key}")
    elif isinstance(obj, list | tuple):
        for index, value in enumerate(obj):
            yield from _not_finite(value, f"{place}[{index}]")


def check_no_run(checkpoint: Path, resume: bool) -> None:
    """Refuse to begin a run in a folder that holds one: it would be lost.

    Args:
        checkpoint: The file that a run keeps in its folder.
        resume: Whether the run is to go on.

    Raises:
        InputError: There is one, and it is not to go on.
    """
    if checkpoint.exists() and not resume:
        raise InputError(
            "holds a run already; --resume goes on with it, another folder takes a new one",
            file=checkpoint.parent,
        )
