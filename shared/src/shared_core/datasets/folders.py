"""Images in folders: class folders in train/ and val/ (the layout of ImageNet), or just images."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shared_core.datasets._rows import class_label, make_dataset
from shared_core.errors import InputError, needs_extra

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Ends of names, in lower case, of files that are taken for images."""

_log = logging.getLogger(__name__)


def image_folder(
    path: str | os.PathLike[str], *, check: bool = True
) -> "datasets.Dataset | datasets.DatasetDict":
    """Images of a folder: labelled where it has train/, val/ or test/ with class folders, else unlabelled.

    With ``train/CLASS/...``, ``val/CLASS/...`` or ``test/CLASS/...``: a `DatasetDict` of the splits that are
    there, as `class_folders` gives each; all have the same classes. Otherwise a `Dataset` of all images in
    the folder and the folders below it, in the order of their paths, with columns image and path. A single
    split on its own is read by ``class_folders("imagenet/val")``.

    Hidden files are passed over. Files that are no images by their suffix are skipped; their number is logged
    as a warning and stands in the data set's ``info.description``.

    Args:
        path: The folder.
        check: Open every image and read its header, so that an unreadable one is named now and not in the
            middle of the work. False saves this time (about 0.1 ms an image and the disk's).

    Raises:
        InputError: The folder is missing or holds no image, an image is unreadable, or splits differ in
            classes.
    """
    with needs_extra("vision"):
        from datasets import DatasetDict, Value
    folder = _existing(Path(path))
    splits = [split for split in SPLITS if (folder / split).is_dir()]
    if splits:
        _same_classes({split: folder / split for split in splits})
        return DatasetDict({split: class_folders(folder / split, check=check) for split in splits})
    files, about = _images(folder, check)
    return make_dataset(files, {"path": files}, features={"path": Value("string")}, about=about)


def class_folders(path: str | os.PathLike[str], *, check: bool = True) -> "datasets.Dataset":
    """Images of one folder a class, as torchvision's ImageFolder reads them; classes are numbered by name.

    Args:
        path: The folder of class folders; images may lie deeper in these.
        check: As for `image_folder`.

    Returns:
        Columns: image, label, path.

    Raises:
        InputError: The folder is missing, has no class folder or one without images, or an image is
            unreadable.
    """
    with needs_extra("vision"):
        from datasets import Value
    folder = _existing(Path(path))
    classes = _classes(folder)
    if not classes:
        raise InputError("has no class folders: expected one folder a class with its images", file=folder)
    files, labels, notes = [], [], []
    for number, name in enumerate(classes):
        found, about = _images(folder / name, check)
        files += found
        labels += [number] * len(found)
        notes.append(about)
    return make_dataset(
        files,
        {"label": labels, "path": files},
        features={"label": class_label(classes), "path": Value("string")},
        about="\n".join(notes),
    )


def _existing(folder: Path) -> Path:
    if not folder.exists():
        raise InputError("there is no such folder", file=folder)
    if not folder.is_dir():
        raise InputError("is a file, expected a folder of images", file=folder)
    return folder


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _same_classes(splits: dict[str, Path]) -> None:
    classes = {split: set(_classes(folder)) for split, folder in splits.items()}
    first, *others = classes
    for other in others:
        for has, lacks in ((first, other), (other, first)):
            if missing := sorted(classes[has] - classes[lacks]):
                shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
                raise InputError(
                    f"lacks {len(missing)} of the class folders that {splits[has]} has: {shown}",
                    file=splits[lacks],
                )


def _images(folder: Path, check: bool) -> tuple[list[str], str]:
    """The images in and below a folder, and a line that counts them and the other files."""
    files = sorted(_files(folder, set()))
    images = [file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
    skipped = len(files) - len(images)
    if not images:
        other = f", only {skipped} files of other kinds" if skipped else ""
        raise InputError(f"holds no image{other}: expected {', '.join(sorted(IMAGE_SUFFIXES))}", file=folder)
    if check:
        _check_readable(folder, images)
    about = f"{len(images)} images in {folder}; {skipped} other files skipped"
    if skipped:
        _log.warning(about)
    return images, about


def _files(folder: Path, seen: set[str]) -> Iterator[str]:
    """All files below a folder but hidden ones; symbolic links are followed, each folder is entered once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(Path(entry.path), seen)
            else:
                yield entry.path


def _check_readable(folder: Path, images: list[str]) -> None:
    from PIL import Image, UnidentifiedImageError

    unreadable = []
    for file in images:
        try:
            with Image.open(file):
                pass
        except UnidentifiedImageError:
            unreadable.append(f"{file} (no image, or damaged)")
        except (OSError, ValueError, SyntaxError) as error:
            unreadable.append(f"{file} ({getattr(error, 'strerror', None) or error})")
    if unreadable:
        shown = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        raise InputError(f"{len(unreadable)} unreadable images: {shown}", file=folder)
