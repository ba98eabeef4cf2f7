"""Data files inside packages, read without importing the package, or from its wheel if it is not installed.

Some packages that carry useful data pin libraries too old to install. A wheel is a zip file: `make setup`
fetches it into .cache/wheels without its dependencies, and these functions read members of it.
"""

import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError
from importlib.metadata import distribution as installed_distribution
from pathlib import Path

from shared_core.errors import InputError

DOWNLOAD = (
    "python -m pip download --no-deps --ignore-requires-python --only-binary=:all: "
    "--require-hashes -d .cache/wheels -r embedded.txt"
)


def cached_wheel(distribution: str) -> Path:
    """Find a distribution's wheel: the newest in the first of the folders that has one.

    The folders are $SHARED_CORE_WHEELS, .cache/wheels in the working directory and in each folder above it,
    and shared-core/wheels in the user's cache folder. Nothing is downloaded.

    Args:
        distribution: The name as in ``pip install NAME``.

    Raises:
        InputError: No folder has it; the message holds the command that fetches it.
    """
    folders = list(_folders())
    for folder in folders:
        wheels = [wheel for wheel in folder.glob("*.whl") if _wheel_name(wheel) == _normal(distribution)]
        if wheels:
            return max(wheels, key=_version_key)
    looked = ", ".join(map(str, folders))
    raise InputError(
        f"{distribution} is neither installed nor is its wheel in the cache (looked in {looked}). In the "
        f"repository `make setup` fetches it, or: {DOWNLOAD} (elsewhere write {distribution} in "
        "place of `--require-hashes -r embedded.txt`)"
    )


def member_names(distribution: str, prefix: str = "") -> list[str]:
    """List the files that a distribution holds, as sorted paths like ``foolbox/data/mnist_00_7.png``.

    Args:
        distribution: The name as in ``pip install NAME``.
        prefix: Only paths that begin with this.

    Raises:
        InputError: It is neither installed nor in the cache.
    """
    package = _installed(distribution)
    names = [file.as_posix() for file in (package.files or [])] if package else []
    if not any(name.startswith(prefix) for name in names):
        with _open(cached_wheel(distribution)) as wheel:
            names = wheel.namelist()
    return sorted(name for name in names if name.startswith(prefix))


def member_bytes(distribution: str, member: str) -> bytes:
    """Read one file of a distribution: of the installed one, or else of its wheel in the cache.

    Args:
        distribution: The name as in ``pip install NAME``.
        member: The path inside the wheel, with forward slashes.

    Raises:
        InputError: It is neither installed nor in the cache, or has no such file.
    """
    package = _installed(distribution)
    path = Path(str(package.locate_file(member))) if package else None
    if path and path.is_file():
        return path.read_bytes()
    try:
        wheel = cached_wheel(distribution)
    except InputError as error:
        if package is None:
            raise
        raise InputError(f"{distribution} {package.version} has no file {member}") from error
    with _open(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError as error:
            raise InputError(f"the wheel has no file {member}", file=wheel) from error


def member_folder(distribution: str, folder: str) -> Path:
    """Give a folder of a distribution as a folder on disk, for libraries that want a path.

    An installed distribution's own folder is given. A wheel's is unpacked beside the wheel once; another
    process that does so at the same time harms nothing.

    Args:
        distribution: The name as in ``pip install NAME``.
        folder: The path inside the wheel, with forward slashes.

    Raises:
        InputError: It is neither installed nor in the cache, has no such folder, or its wheel's own folder
            cannot be written to.
    """
    package = _installed(distribution)
    path = Path(str(package.locate_file(folder))) if package else None
    if path and path.is_dir():
        return path
    wheel = cached_wheel(distribution)
    unpacked = wheel.parent / "unpacked" / wheel.stem
    if not unpacked.is_dir():
        _unpack(wheel, unpacked)
    if not (unpacked / folder).is_dir():
        raise InputError(f"the wheel has no folder {folder}", file=wheel)
    return unpacked / folder


def _unpack(wheel: Path, target: Path) -> None:
    """Unpack a wheel into a folder that is there whole or not at all."""
    try:
        target.parent.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot be unpacked: {error.strerror}", file=error.filename) from error
    try:
        with _open(wheel) as archive:
            archive.extractall(scratch)
        scratch.chmod(0o755)  # mkdtemp's is the owner's alone
        os.replace(scratch, target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _installed(distribution: str) -> Distribution | None:
    try:
        return installed_distribution(distribution)
    except PackageNotFoundError:
        return None


def _folders() -> Iterator[Path]:
    if chosen := os.environ.get("SHARED_CORE_WHEELS"):
        yield Path(chosen)
    yield Path.cwd() / ".cache" / "wheels"
    yield from (cache for above in Path.cwd().parents if (cache := above / ".cache" / "wheels").is_dir())
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    yield Path(os.environ.get("XDG_CACHE_HOME") or default) / "shared-core" / "wheels"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _wheel_name(wheel: Path) -> str:
    return _normal(wheel.name.partition("-")[0])


def _version_key(wheel: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", wheel.name.split("-")[1])]


def _open(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as error:
        raise InputError(
            "is not a whole wheel (zip file): delete it and fetch it again", file=wheel
        ) from error
