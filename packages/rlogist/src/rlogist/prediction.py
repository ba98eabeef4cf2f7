"""The answer to a reading of a slide: classes, the path, and what was read for it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlogist.episode import Look
from rlogist.ledger import ReadLedger


@dataclass(frozen=True)
class Prediction:
    """What a reading found, and what it cost.

    Attributes:
        slide: The slide's name.
        status: `read`, or `no tissue`: there is no class then.
        classes: Names of the classes.
        probability: Of each class; empty without tissue.
        start: Of each class, from the scan alone.
        path: The looks in order.
        regions: N, with damaged ones.
        region_index: Which of the grid the rows of the state are.
        attention: Of the classifier at the end, one number a row.
        seconds: Wall time with opening's segmentation, scan, networks.
        ledger: What was read for this answer; its notes are all that is known of the slide.
        rho: Share of regions that was asked for.
        deep_pixel_ratio: Pixels read at depth / those of all regions; None for features that were read
            earlier.
    """

    slide: str
    status: Literal["read", "no tissue"]
    classes: list[str]
    probability: list[float]
    start: list[float]
    path: list[Look]
    regions: int
    region_index: list[int]
    attention: list[float]
    seconds: float
    ledger: ReadLedger
    rho: float
    deep_pixel_ratio: float | None = None

    @property
    def prob(self) -> float:
        """Probability of the last class, of two the positive one; NaN without tissue."""
        return self.probability[-1] if self.probability else float("nan")

    @property
    def label(self) -> str | None:
        """Name of the most likely class; None without tissue."""
        if not self.probability:
            return None
        return self.classes[max(range(len(self.classes)), key=self.probability.__getitem__)]

    @property
    def reads(self) -> int:
        """Number of reads of any kind."""
        return self.ledger.total().reads

    @property
    def looks(self) -> int:
        """Number of regions that were looked at in depth."""
        return sum(look.damaged is None for look in self.path)

    @property
    def observation_ratio(self) -> float:
        """Looked-at regions / N; 0 without regions."""
        return self.looks / self.regions if self.regions else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "slide": self.slide,
            "status": self.status,
            "label": self.label,
            "classes": self.classes,
            "probability": self.probability,
            "start": self.start,
            "path": [asdict(look) for look in self.path],
            "regions": self.regions,
            "looks": self.looks,
            "observation_ratio": self.observation_ratio,
            "deep_pixel_ratio": self.deep_pixel_ratio,
            "region_index": self.region_index,
            "attention": self.attention,
            "seconds": self.seconds,
            "reads": self.reads,
            "rho": self.rho,
            "ledger": self.ledger.to_dict(),
        }
