"""What was measured of one model: a table by layer, by class and by type, as JSON, pandas and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_core import InputError, files

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "isocse geometry 1"


@dataclass(frozen=True)
class Measure:
    """What a number is.

    Attributes:
        label: For people.
        definition: In one sentence.
        sampled: Whether it rests on a sample of the corpus's sentences rather than on all of it.
    """

    label: str
    definition: str
    sampled: bool = False


MEASURES: dict[str, Measure] = {
    "anisotropy": Measure(
        "anisotropy", "expected cosine of two tokens drawn from two different sentences, over all draws"
    ),
    "anisotropy_sampled": Measure(
        "anisotropy, one draw", "mean cosine of one token each of up to 1,000 sentences, as published", True
    ),
    "anisotropy_tokens": Measure("anisotropy, all tokens", "mean cosine of all pairs of tokens"),
    "intra_sentence": Measure(
        "intra-sentence similarity", "mean cosine of tokens with their sentence's mean"
    ),
    "adjusted_intra_sentence": Measure(
        "intra-sentence, adjusted", "intra-sentence similarity less the anisotropy baseline"
    ),
    "self_similarity": Measure("self-similarity", "mean cosine of a type's occurrences, mean over types"),
    "adjusted_self_similarity": Measure(
        "self-similarity, adjusted", "self-similarity less the anisotropy baseline"
    ),
    "self_similarity_other_count": Measure(
        "self-similarity, other count",
        "the same with the other count: first occurrences in a sentence, or all",
    ),
    "spurious_contextualization": Measure(
        "spurious contextualization", "1 less the adjusted self-similarity of semantic types"
    ),
    "norm": Measure("norm", "mean length of token states"),
    "norm_spread": Measure("norm, spread", "standard deviation of the length of token states"),
    "mean_distance": Measure("mean's distance", "distance of the mean token state from the origin"),
    "mean_share": Measure("common component", "share of the mean vector in the energy of token states"),
    "cosine_to_mean": Measure("cosine to mean", "mean cosine of token states with their mean"),
    "residual_anisotropy": Measure(
        "anisotropy, centred", "mean cosine of drawn tokens once the mean state is taken away", True
    ),
    "isoscore_tokens": Measure("IsoScore, tokens", "IsoScore of one drawn token a sentence"),
    "partition_tokens": Measure(
        "partition, tokens", "least to greatest partition function of drawn tokens", True
    ),
    "top_dimension_share": Measure(
        "top dimension", "share of the greatest dimension in the expected cosine, where that is not noise"
    ),
    "sentence_cosine": Measure("sentence cosine", "mean cosine of all pairs of sentence vectors"),
    "isoscore_sentences": Measure("IsoScore, sentences", "IsoScore of sentence vectors"),
    "uniformity": Measure("uniformity", "log mean exp(-2 |u - v|^2) of sentence vectors", True),
    "partition_sentences": Measure(
        "partition, sentences", "least to greatest partition function of sentence vectors", True
    ),
    "alignment": Measure("alignment", "mean |u - u+|^2 of given positive pairs"),
}


@dataclass
class TypeTable:
    """The analysed types.

    Attributes:
        tokens: As the tokenizer writes them, or words.
        texts: What they stand for, lower case.
        classes: Of each, a name of `isocse.types.CLASSES`.
        counts: Occurrences in the corpus.
        analysed: Whether each is in the mean: special tokens are reported apart.
        self_similarity: By layer and type; NaN where there is none.
    """

    tokens: list[str]
    texts: list[str]
    classes: list[str]
    counts: np.ndarray
    analysed: np.ndarray
    self_similarity: np.ndarray


@dataclass
class TokenMap:
    """The last layer on principal components: drawn tokens, and all tokens of some sentences on theirs.

    Attributes:
        points: Drawn tokens, (n, 2).
        texts: What they are.
        classes: Of each.
        sentence_points: All tokens of some sentences, (m, 2).
        sentence_texts: What they are.
        sentences: The sentence of each.
        explained: Share of the variance of drawn tokens on each component.
        sentence_explained: The same of the sentences' tokens.
    """

    points: np.ndarray
    texts: list[str]
    classes: list[str]
    sentence_points: np.ndarray
    sentence_texts: list[str]
    sentences: list[int]
    explained: list[float]
    sentence_explained: list[float] = field(default_factory=list)


@dataclass
class GeometryReport:
    """The geometry of a model on a corpus.

    Attributes:
        model: Its name.
        settings: How it was measured.
        corpus: Counts of what was measured and what was left out.
        layers: Numbers of the layers, 0 for the embeddings.
        measures: Name, as in `MEASURES`, to one value a layer; NaN where a layer has none.
        errors: Name to standard errors, for each measure that rests on a sample of sentences or types.
        by_class: Class to name to one value a layer.
        by_frequency: Frequency bin to class to mean self-similarity by layer.
        types: The analysed types.
        top_dimensions: By layer, (dimension, absolute contribution, share or None), greatest first.
        removal: What is left of the drawn tokens without some dimensions: name to measure to values by layer.
        treated: Treatment to measure to values by layer.
        map: For a picture of the last layer.
        notes: What a reader should know, such as sentences left out.
    """

    model: str
    settings: dict[str, Any]
    corpus: dict[str, int]
    layers: list[int]
    measures: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    by_class: dict[str, dict[str, np.ndarray]]
    by_frequency: dict[str, dict[str, np.ndarray]]
    types: TypeTable
    top_dimensions: list[list[tuple[int, float, float | None]]]
    removal: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    treated: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    map: TokenMap | None = None
    notes: list[str] = field(default_factory=list)

    def last(self, name: str) -> float:
        """A measure of the last layer."""
        return float(self.measures[name][-1])

    def to_pandas(self) -> pd.DataFrame:
        """A row a layer, a column a measure; standard errors as ``<measure>_error``."""
        import pandas as pd

        columns = dict(self.measures) | {f"{name}_error": values for name, values in self.errors.items()}
        return pd.DataFrame(columns, index=pd.Index(self.layers, name="layer"))

    def types_to_pandas(self) -> pd.DataFrame:
        """A row a type: token, class, count and the self-similarity at each layer."""
        import pandas as pd

        table = self.types
        frame = pd.DataFrame(
            {"token": table.tokens, "text": table.texts, "class": table.classes, "count": table.counts}
        )
        for layer, values in zip(self.layers, table.self_similarity, strict=True):
            frame[f"layer_{layer}"] = values
        return frame

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, atomically."""
        files.write_json(path, {"format": FORMAT} | _plain(asdict(self)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> GeometryReport:
        """Read what `to_json` wrote.

        Raises:
            InputError: The file is missing or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", file=path) from error
        except ValueError as error:
            raise InputError(f"is not JSON: {error}", file=path) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError("is not a geometry.json of `isocse measure`", file=path)
        try:
            return cls._read(content)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"is damaged: {error}", file=path) from error

    @classmethod
    def _read(cls, content: dict[str, Any]) -> GeometryReport:
        table, drawn = content["types"], content["map"]
        names = ("model", "settings", "corpus", "layers", "notes")
        plain: dict[str, Any] = {name: content[name] for name in names}
        curves: dict[str, Any] = {name: _arrays(content[name]) for name in ("measures", "errors")}
        nested: dict[str, Any] = {
            name: {key: _arrays(value) for key, value in content[name].items()}
            for name in ("by_class", "by_frequency", "removal", "treated")
        }
        return cls(
            **plain,
            **curves,
            **nested,
            types=TypeTable(
                **{name: table[name] for name in ("tokens", "texts", "classes")},
                counts=np.array(table["counts"], dtype=np.int64),
                analysed=np.array(table["analysed"], dtype=bool),
                self_similarity=_array(table["self_similarity"]).reshape(len(content["layers"]), -1),
            ),
            top_dimensions=[[(k, a, s) for k, a, s in rows] for rows in content["top_dimensions"]],
            map=None
            if drawn is None
            else TokenMap(
                **drawn | {name: _array(drawn[name]).reshape(-1, 2) for name in ("points", "sentence_points")}
            ),
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the measures by layer into a picture."""
        from isocse.pictures import layer_curves
        from shared_core import plot

        plot.save(layer_curves({self.model: self}), path)


def _plain(value: Any) -> Any:
    """Arrays as lists with eight digits after the point, and null where there is no number."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return round(value, 8) if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)  # null becomes NaN


def _arrays(values: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: _array(row) for name, row in values.items()}
