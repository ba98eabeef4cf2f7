"""Inputs of models: synthetic ones, images of a folder, or rows of a data set on disk."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from migperf.workloads import Workload
from shared_core import InputError
from shared_core.errors import needs_extra

Item = tuple[Tensor, Tensor]
"""An input and its label."""


class Inputs:
    """Inputs of a step on the host, pinned where they have to travel: a batch made beforehand, or read anew.

    Args:
        batch: Made beforehand.
        labels: Of the batch.
        items: Reads one after another, without end; None: the batch is used again and again.
    """

    def __init__(self, batch: Tensor, labels: Tensor, items: Iterator[Item] | None) -> None:
        self.batch, self.labels, self.items = batch, labels, items

    def next(self, count: int, phases: dict[str, float]) -> Item:
        """Return inputs and labels of so many items; reading them is timed as `pipeline`."""
        if self.items is None:
            return self.batch[:count], self.labels[:count]
        begin = time.perf_counter_ns()
        found = _stacked(self.items, count)
        phases["pipeline"] = time.perf_counter_ns() - begin
        return found


def inputs_of(workload: Workload, vocabulary: int, device: str, requests: int) -> Inputs:
    """Return the inputs that a workload asks for.

    Args:
        workload: A model's.
        vocabulary: Tokens that a text model knows; 0 for images.
        device: `cpu` or `cuda:0`.
        requests: The most that one step must serve.
    """
    count = workload.batch * requests
    generator = torch.Generator().manual_seed(workload.seed)
    labels = torch.randint(workload.classes, (count,), generator=generator)
    if vocabulary:
        batch = torch.randint(1, vocabulary, (count, workload.sequence_length), generator=generator)
    else:
        size = workload.image_size
        batch = torch.rand(count, 3, size, size, generator=generator).to(getattr(torch, workload.dtype))
    items = None
    if workload.image_folder:
        items = _folder(workload)
    elif workload.dataset:
        items = _dataset(workload, vocabulary)
    if items is not None and workload.preload:
        batch, labels = _stacked(items, count)
        items = None
    if device.startswith("cuda"):
        batch, labels = batch.pin_memory(), labels.pin_memory()
    return Inputs(batch, labels, items)


def _stacked(items: Iterator[Item], count: int) -> Item:
    pairs = [next(items) for _ in range(count)]
    return torch.stack([item for item, _ in pairs]), torch.stack([label for _, label in pairs])


def _forever(workload: Workload, count: int, read: Callable[[int], Item]) -> Iterator[Item]:
    """Read in a seeded order, again and again."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(workload.seed)).tolist()
    while True:
        for index in order:
            yield read(index)


def _transform(workload: Workload) -> Callable[[Any], Tensor]:
    from torchvision import transforms

    size = (workload.image_size, workload.image_size)
    read = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    return lambda image: read(image.convert("RGB")).to(getattr(torch, workload.dtype))


def _folder(workload: Workload) -> Iterator[Item]:
    """Return the images of a folder that has one folder a class."""
    from torchvision import datasets

    try:
        found = datasets.ImageFolder(workload.image_folder, _transform(workload))
    except FileNotFoundError as error:
        raise InputError(
            f"has no images: {error}", field="image_folder", value=workload.image_folder
        ) from error
    _check_classes(workload, len(found.classes))

    def read(index: int) -> Item:
        image, label = found[index]
        return image, torch.tensor(label)

    return _forever(workload, len(found), read)


def _check_classes(workload: Workload, classes: int) -> None:
    if classes > workload.classes:
        raise InputError(
            f"has {classes} classes, more than the model's", field="classes", value=workload.classes
        )


def _dataset(workload: Workload, vocabulary: int) -> Iterator[Item]:
    """Return the rows of a data set that Hugging Face's `datasets` reads from disk; nothing is downloaded."""
    with needs_extra("datasets", "migperf"):
        import datasets
        from datasets.exceptions import DatasetGenerationError

    def wrong(message: str) -> InputError:
        return InputError(message, field="dataset", value=workload.dataset)

    path = Path(workload.dataset)
    kind = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}.get(path.suffix)
    try:
        if path.is_dir():
            found: Any = datasets.load_from_disk(str(path))
        elif kind:
            found = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            raise wrong("expected a folder of save_to_disk, or a parquet, csv or json file")
    except (FileNotFoundError, DatasetGenerationError) as error:
        raise wrong(f"cannot be read: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = next(iter(found.values()))
    if not len(found):
        raise wrong("has no rows")
    label = next((name for name in ("label", "labels") if name in found.column_names), None)
    if label is not None:
        _check_classes(workload, 1 + max(found[label]))
    column, convert = _column(workload, vocabulary, found, wrong)

    def read(index: int) -> Item:
        row = found[index]
        return convert(row[column]), torch.tensor(0 if label is None else row[label])

    return _forever(workload, len(found), read)


def _column(
    workload: Workload, vocabulary: int, found: Any, wrong: Callable[[str], InputError]
) -> tuple[str, Callable[[Any], Tensor]]:
    """Return the column with the inputs, and what makes a tensor of one of them."""
    names: Sequence[str] = found.column_names
    if not vocabulary:
        kinds = {name: type(feature).__name__ for name, feature in found.features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        if not images:
            raise wrong(f"has no column of images (there are: {', '.join(names)})")
        return images[0], _transform(workload)
    if "input_ids" in names:
        return "input_ids", lambda tokens: _padded(tokens, workload, vocabulary, wrong)
    if "text" not in names:
        raise wrong(f"expected a column input_ids or text (there are: {', '.join(names)})")
    if not workload.tokenizer:
        raise InputError("name the folder of the tokenizer that reads the text", field="tokenizer")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError("is no tokenizer's folder", field="tokenizer", value=workload.tokenizer) from error
    return "text", lambda text: _padded(
        tokenizer(text, truncation=True, max_length=workload.sequence_length)["input_ids"],
        workload, vocabulary, wrong,
    )  # fmt: skip


def _padded(
    tokens: Sequence[int], workload: Workload, vocabulary: int, wrong: Callable[[str], InputError]
) -> Tensor:
    """Return tokens cut or padded with 0 to the sequence length."""
    length = workload.sequence_length
    found = list(tokens)[:length]
    if found and max(found) >= vocabulary:
        raise wrong(f"has token {max(found)}, the model knows {vocabulary}")
    return torch.tensor(found + [0] * (length - len(found)))
