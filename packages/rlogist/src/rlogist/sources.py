"""Where an agent's features come from: a slide that is read only where it looks, or features read earlier."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rlogist.extractors import Extractor
from rlogist.features import SlideFeatures
from rlogist.ledger import ReadLedger
from rlogist.slides import Slide
from shared_core import InputError


class FeatureSource(ABC):
    """One slide's features. Rows are its readable regions, `region_index` says which of the grid they are.

    An own source is a subclass: of another reader, another cache.
    """

    name: str
    ledger: ReadLedger

    @property
    @abstractmethod
    def region_index(self) -> Int64[np.ndarray, " rows"]:
        """The grid's index of each row."""

    @abstractmethod
    def scan(self) -> Float[Tensor, "rows dim"]:
        """Z: every row at scan magnification."""

    @abstractmethod
    def deep(self, row: int) -> Float[Tensor, "patches dim"]:
        """U of one row. Raises `UnreadableRegion` where its pixels are damaged."""

    def corner(self, row: int) -> tuple[int, int] | None:
        """Top-left corner of a row's region, level-0 pixels; None where this source does not know."""
        return None


class SlideSource(FeatureSource):
    """A slide file: the scan is read once, a region's deep patches when they are asked for.

    Args:
        slide: The slide.
        extractor: The encoder.
        batch: Patches of the scan that are encoded together.
    """

    def __init__(self, slide: Slide, extractor: Extractor, batch: int = 64) -> None:
        self.slide, self.extractor, self.batch = slide, extractor, batch
        self.name, self.ledger = slide.path.stem, slide.ledger

    @property
    def region_index(self) -> Int64[np.ndarray, " rows"]:
        """The grid's index of each readable region; reads the scan."""
        return self._scan[0]

    def scan(self) -> Float[Tensor, "rows dim"]:
        """Z, extracted at the first call."""
        return self._scan[1]

    def deep(self, row: int) -> Float[Tensor, "patches dim"]:
        """One block read, split into K patches, encoded in one batch."""
        found = self.extractor(self.slide.read_region_block(int(self.region_index[row])))
        return _finite(found, f"{self.extractor.name} at depth", self.name)

    def corner(self, row: int) -> tuple[int, int]:
        """As in the slide's grid."""
        return _pair(self.slide.regions.xy[self.region_index[row]])

    @cached_property
    def _scan(self) -> tuple[Int64[np.ndarray, " rows"], Float[Tensor, "rows dim"]]:
        kept, rows = [np.empty(0, np.int64)], [torch.empty(0, self.extractor.dim)]
        for indices, patches in self.slide.scan_patches(self.batch):
            kept.append(np.array(indices, np.int64))
            rows.append(self.extractor(patches))
        return np.concatenate(kept), _finite(torch.cat(rows), f"{self.extractor.name} at the scan", self.name)


class CachedSource(FeatureSource):
    """Features that were read earlier, with deep ones for every region.

    Args:
        features: With `deep`.
        name: Of the slide.

    Raises:
        InputError: There are no deep features, or some are NaN or infinite.
    """

    def __init__(self, features: SlideFeatures, name: str = "") -> None:
        self.name = name or str(features.attributes.get("slide", "features"))
        if features.deep is None:
            raise InputError(
                f"{self.name} has no deep features: extract with --deep (deep=True)", field="deep_features"
            )
        self.features, self.ledger = features, ReadLedger()
        self._deep = _finite(torch.from_numpy(features.deep), "the extractor at depth", self.name)
        _finite(self.scan(), "the extractor at the scan", self.name)

    @property
    def region_index(self) -> Int64[np.ndarray, " rows"]:
        """The grid's index of each row."""
        return self.features.region_index

    def scan(self) -> Float[Tensor, "rows dim"]:
        """Z."""
        return torch.from_numpy(self.features.features)

    def deep(self, row: int) -> Float[Tensor, "patches dim"]:
        """U of one row."""
        return self._deep[row]

    def corner(self, row: int) -> tuple[int, int]:
        """As the features say."""
        return _pair(self.features.coords[row])


@dataclass(frozen=True)
class Bag:
    """One labelled slide for training: all features of all its regions.

    Attributes:
        scan: Z.
        deep: U.
        label: Class, from 0.
        name: Of the slide.
        patient: Whose slide; splits never part a patient.
    """

    scan: Float[Tensor, "regions dim"]
    deep: Float[Tensor, "regions patches dim"]
    label: int
    name: str = ""
    patient: str = ""

    def __len__(self) -> int:
        return len(self.scan)

    def to(self, device: str | torch.device) -> "Bag":
        """The same slide with its features on a device."""
        return replace(self, scan=self.scan.to(device), deep=self.deep.to(device))


def bag_of(features: SlideFeatures, label: int, name: str = "", patient: str = "") -> Bag:
    """A training bag from a slide's features.

    Raises:
        InputError: No deep features, or no region at all.
    """
    source = CachedSource(features, name)
    if not len(features):
        raise InputError(f"{source.name} has no region (no tissue): leave it out of training")
    return Bag(source.scan(), torch.from_numpy(np.asarray(features.deep)), label, source.name, patient)


def check_bags(bags: Sequence[Bag], classes: int | None = None) -> tuple[int, int]:
    """Dimension of features and number of classes of bags that fit together.

    Raises:
        InputError: None at all, several dimensions, NaN, or labels that are not 0 to classes - 1 with two at
            least.
    """
    if not bags:
        raise InputError("expected at least one slide", field="bags")
    dims = sorted({bag.scan.shape[1] for bag in bags} | {bag.deep.shape[2] for bag in bags})
    if len(dims) > 1:
        raise InputError(f"expected features of one dimension, got {dims}", field="bags")
    empty = [bag.name for bag in bags if not len(bag)]
    if empty:
        raise InputError(f"slides without regions: {', '.join(empty)}", field="bags")
    for bag in bags:
        _finite(bag.scan, "the extractor at the scan", bag.name)
        _finite(bag.deep, "the extractor at depth", bag.name)
    labels = {bag.label for bag in bags}
    found = classes or max(labels) + 1
    if not labels <= set(range(found)):
        raise InputError(
            f"expected labels from 0 to {found - 1}", field="label", value=sorted(labels - set(range(found)))
        )
    if classes is None and labels != set(range(max(found, 2))):
        raise InputError(
            "expected slides of at least two classes, numbered from 0 without gaps",
            field="label",
            value=sorted(labels),
        )
    return dims[0], found


def _pair(xy: Int64[np.ndarray, " 2"]) -> tuple[int, int]:
    return int(xy[0]), int(xy[1])


def _finite(features: Tensor, what: str, name: str) -> Tensor:
    if not features.isfinite().all():
        raise InputError(f"{name}: {what} gives NaN or infinite features")
    return features
