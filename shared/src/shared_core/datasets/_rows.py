"""How images become rows: encoded bytes in memory, decoded to PIL images when a row is read."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_core.errors import needs_extra

if TYPE_CHECKING:
    import datasets


def make_dataset(
    images: Iterable[bytes | str], columns: dict[str, Sequence[Any]], *, features: dict[str, Any], about: str
) -> "datasets.Dataset":
    """Rows with an "image" column of encoded bytes or file names, beside other columns."""
    with needs_extra("vision"):
        from datasets import Dataset, DatasetInfo, Features, Image
    encoded = [{"bytes": image} if isinstance(image, bytes) else {"path": image} for image in images]
    rows = {"image": [{"bytes": None, "path": None} | image for image in encoded], **columns}
    schema = Features({"image": Image(), **features})
    return Dataset.from_dict(rows, features=schema, info=DatasetInfo(description=about, features=schema))


def class_label(names: Sequence[str] | int) -> Any:
    """The feature of a label column, by class names or by their number."""
    with needs_extra("vision"):
        from datasets import ClassLabel
    return ClassLabel(num_classes=names) if isinstance(names, int) else ClassLabel(names=list(names))


def netpbm(pixels: np.ndarray) -> list[bytes]:
    """Encode uint8 images (n, height, width) or (n, height, width, 3) losslessly.

    Binary PGM and PPM are a header before the pixels, so 60,000 images take a fraction of a second; PNG
    takes many times that.
    """
    height, width = pixels.shape[1:3]
    header = f"{'P6' if pixels.ndim == 4 else 'P5'} {width} {height} 255\n".encode()
    return [header + image.tobytes() for image in np.ascontiguousarray(pixels, dtype=np.uint8)]
