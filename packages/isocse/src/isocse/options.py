"""How a corpus is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isocse.types import Classifier
from shared_core import InputError

BASELINES: dict[str, str] = {
    "expected": "anisotropy",
    "sampled": "anisotropy_sampled",
    "tokens": "anisotropy_tokens",
}
"""Name to the measure that it is."""


@dataclass(frozen=True)
class Options:
    """How a corpus is measured; the arguments of `analyze`.

    Attributes:
        layers: "all", or numbers; negative ones count from the last.
        pooling: Of sentence vectors; the model's own where None.
        classes: "stopwords", "frequency", a classifier, or a table from text to class.
        min_count: Fewest occurrences of a type that is analysed.
        sample: Sentences of the samples.
        seed: Of samples and bootstraps.
        include_special: Whether [CLS], [SEP] and the like count in measures of tokens.
        unit: "token", or "word" to put the tokens of a word together.
        baseline: What adjusted values are less of: "expected" (over all draws), "sampled" (one draw), or
            "tokens".
        compat: "official" measures as the paper's published code.
        treatments: "remove-k" for the k dimensions with the greatest contributions, "center", "standardize".
        batch_tokens: Positions of a batch.
        detail: Also measure what needs the samples' pairs and eigenvectors.
    """

    layers: str | Sequence[int] = "all"
    pooling: str | None = None
    classes: str | Classifier | Mapping[str, str] = "stopwords"
    min_count: int = 5
    sample: int = 1000
    seed: int = 0
    include_special: bool = True
    unit: str = "token"
    baseline: str = "expected"
    compat: str | None = None
    treatments: Sequence[str] = ()
    batch_tokens: int = 2048
    detail: bool = True

    def __post_init__(self) -> None:
        allowed = {
            "unit": ("token", "word"),
            "baseline": tuple(BASELINES),
            "compat": (None, "official"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values if value)
                raise InputError(f"expected one of {listed}", field=name, value=getattr(self, name))
        for name, least in (("min_count", 2), ("sample", 4), ("batch_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"expected {least} or more", field=name, value=getattr(self, name))
        if self.compat == "official" and self.unit == "word":
            raise InputError("expected token with compat official", field="unit", value=self.unit)
        for name in self.treatments:
            removed_dimensions(name)


def make_options(given: Mapping[str, Any]) -> Options:
    """Options from keyword arguments; a misspelt one is an error that names those there are."""
    unknown = sorted(set(given) - set(Options.__dataclass_fields__))
    if unknown:
        known = ", ".join(Options.__dataclass_fields__)
        raise TypeError(f"unexpected argument {', '.join(unknown)}; options: {known}")
    return Options(**given)


def removed_dimensions(name: str) -> int:
    """Dimensions that a treatment removes."""
    kind, _, number = name.partition("-")
    if kind == "remove" and number.isdigit() and int(number) > 0:
        return int(number)
    if name in ("center", "standardize"):
        return 0
    raise InputError("expected remove-K, center or standardize", field="treatments", value=name)
