"""Training images, each with the flag that its lottery drew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kdcicam.data import Images
from kdcicam.images import Augmentation, read_image
from shared_core import InputError

_FLAG, _ORDER, _AUGMENT = range(3)


@dataclass(frozen=True)
class Batch:
    """Images as both student and teacher see them."""

    images: Float[Tensor, "batch 3 size size"]
    labels: Int[Tensor, " batch"]
    flags: Int[Tensor, " batch"]

    def to(self, device: torch.device) -> Batch:
        """Return it on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in (self.images, self.labels, self.flags)))


def derived_seed(*numbers: int) -> int:
    """A seed for one purpose, image, step or epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def draw_flag(flags: Sequence[int], seed: int, epoch: int, index: int) -> int:
    """The flag of an image in an epoch, uniform over `flags` and independent of all other images."""
    return flags[derived_seed(seed, epoch, index, _FLAG) % len(flags)]


class FlaggedImages(Dataset[tuple[Tensor, int, int]]):
    """Images that are read, flagged and augmented by their flag. Keys are (epoch, index).

    What a key gives depends on the key and the seed alone: not on workers, nor on what was read before.

    Args:
        images: Of the training split.
        size: Side of the tensors.
        augmentations: For each flag that may be drawn.
        flags: Drawn from uniformly, for each image and epoch anew.
        seed: Of flags and augmentation.
        keep: Read each file once and keep its pixels: for sets that fit in memory.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        augmentations: Mapping[int, Augmentation],
        flags: Sequence[int] = (0,),
        seed: int = 0,
        *,
        keep: bool = False,
    ) -> None:
        if lacking := set(flags) - set(augmentations):
            raise InputError("no augmentation for this flag", field="flags", value=min(lacking))
        self.images, self.size, self.seed = images, size, seed
        self.augmentations, self.flags = dict(augmentations), tuple(flags)
        self.keep, self.kept = keep, dict[int, Image.Image]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        flag = draw_flag(self.flags, self.seed, epoch, index)
        image = self.kept.get(index)
        if image is None:
            image = read_image(self.images.files[index])
            if self.keep:
                self.kept[index] = image
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(derived_seed(self.seed, epoch, index, _AUGMENT))
            pixels = self.augmentations[flag](image, self.size)
        return pixels, self.images.labels[index], flag


def collate(items: Sequence[tuple[Tensor, int, int]]) -> Batch:
    """Make a batch of items."""
    images, labels, flags = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(flags))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Keys of each step's batch, from a step on: each epoch a new permutation, its last odd images left out.

    Of several processes each takes every n-th image of the batch, so that a step is the same batch whatever
    their number.

    Args:
        count: Images.
        batch_size: Of all processes together.
        first: Step to begin with.
        steps: Step to end before.
        seed: Of the permutations.
        rank: This process.
        processes: How many there are.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        first: int,
        steps: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        if self.batch_size % processes:
            raise InputError(
                f"expected a multiple of the {processes} processes", field="batch_size", value=self.batch_size
            )
        self.first, self.steps, self.rank, self.processes = first, steps, rank, processes

    def __len__(self) -> int:
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        each, order, known = self.count // self.batch_size, torch.empty(0), -1
        for step in range(self.first, self.steps):
            epoch, place = divmod(step, each)
            if epoch != known:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch, 0, _ORDER))
                order, known = torch.randperm(self.count, generator=generator), epoch
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in batch[self.rank :: self.processes]]
