"""`compare`: what changed from one model to another, by layer and by type, semantic against functional."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats

from isocse.analysis import analyze
from isocse.encoders import load_encoder, pad, tokenize
from isocse.report import GeometryReport, _plain
from shared_core import InputError, files

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000
PERMUTATIONS = 5000
STRATA = 5
"""Bins of frequency within which semantic and functional types are compared."""


@dataclass(frozen=True)
class GroupTest:
    """Change of self-similarity of semantic types against that of functional ones.

    Attributes:
        semantic: Mean change of semantic types.
        semantic_interval: Its 95 % interval over types.
        functional: Mean change of functional types.
        functional_interval: Its 95 % interval.
        difference: Semantic minus functional.
        difference_interval: Its 95 % interval.
        p: Of the difference, two-sided, by permutation of the types' classes.
        matched_difference: The same within bins of frequency, weighted by how many of both are there.
        matched_p: Its p, by permutation within bins.
        slope: Change per unit of log frequency, of all analysed types.
        slope_p: Its p.
        adjusted_difference: Semantic minus functional at equal log frequency, by least squares.
        adjusted_error: Its standard error.
        counts: Semantic and functional types.
    """

    semantic: float
    semantic_interval: tuple[float, float]
    functional: float
    functional_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    p: float
    matched_difference: float
    matched_p: float
    slope: float
    slope_p: float
    adjusted_difference: float
    adjusted_error: float
    counts: tuple[int, int]


@dataclass
class ShiftReport:
    """Two models on one corpus.

    Attributes:
        before: The first model.
        after: The second.
        tokens: Analysed types, in the order of `delta`.
        classes: Of each.
        counts: Of each.
        delta: Change of self-similarity at the last layer, not adjusted.
        adjusted_delta: The same of adjusted self-similarity: `AdjSelfSim_after - AdjSelfSim_before`. Its
            negative is the growth of spurious contextualization.
        raw: The group test of `delta`.
        adjusted: The group test of `adjusted_delta`.
        same_sense: Cosine of words in pairs of contexts where their meaning is the same, before and after,
            less the anisotropy; None where no table was given.
    """

    before: GeometryReport
    after: GeometryReport
    tokens: list[str]
    classes: list[str]
    counts: np.ndarray
    delta: np.ndarray
    adjusted_delta: np.ndarray
    raw: GroupTest
    adjusted: GroupTest
    same_sense: tuple[float, float] | None = None

    def risers(self, count: int = 20) -> list[tuple[str, str, float]]:
        """Types whose adjusted self-similarity rose most: (token, class, change)."""
        return self._ordered(np.argsort(-self.adjusted_delta, kind="stable")[:count])

    def fallers(self, count: int = 20) -> list[tuple[str, str, float]]:
        """Types whose adjusted self-similarity fell most."""
        return self._ordered(np.argsort(self.adjusted_delta, kind="stable")[:count])

    def _ordered(self, rows: np.ndarray) -> list[tuple[str, str, float]]:
        return [(self.tokens[n], self.classes[n], float(self.adjusted_delta[n])) for n in rows]

    def to_pandas(self) -> pd.DataFrame:
        """A row a type."""
        import pandas as pd

        return pd.DataFrame(
            {
                "token": self.tokens,
                "class": self.classes,
                "count": self.counts,
                "delta": self.delta,
                "adjusted_delta": self.adjusted_delta,
            }
        )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, atomically."""
        files.write_json(path, {"format": "isocse shift 1"} | _plain(asdict(self)))


def compare(
    before: Any,
    after: Any,
    sentences: Iterable[Any] | None = None,
    *,
    same_sense: Sequence[tuple[str, str, str]] | None = None,
    tokenizers: tuple[Any, Any] = (None, None),
    **options: Any,
) -> ShiftReport:
    """Compare two models on a corpus.

    Args:
        before: A model as for `analyze`, or its `GeometryReport`.
        after: The other one.
        sentences: The corpus, where a model is to be measured.
        same_sense: (word, sentence, sentence) where the word means the same in both, to tell drift from
            changes of meaning.
        tokenizers: Of the two, for transformers models.
        options: Of `analyze`.

    Raises:
        InputError: The models have different tokenizers, so that types cannot be matched; use
            ``unit="word"``.
    """
    reports = []
    for model, tokenizer in zip((before, after), tokenizers, strict=True):
        if isinstance(model, GeometryReport):
            reports.append(model)
            continue
        if sentences is None:
            raise InputError("is missing: a model is measured on sentences", field="sentences")
        reports.append(analyze(model, sentences, tokenizer=tokenizer, **options))
    found = compare_reports(*reports, seed=int(options.get("seed", 0)))
    if same_sense is not None:
        values = []
        for model, tokenizer, report in zip((before, after), tokenizers, reports, strict=True):
            if isinstance(model, GeometryReport):
                raise InputError("needs models, not saved reports", field="same_sense")
            cosines = same_sense_cosines(model, same_sense, tokenizer=tokenizer)
            values.append(float(cosines.mean()) - report.last("anisotropy"))
        found.same_sense = (values[0], values[1])
    return found


def compare_reports(before: GeometryReport, after: GeometryReport, *, seed: int = 0) -> ShiftReport:
    """Compare two measured models, by their last layers.

    Raises:
        InputError: They were measured in different ways, on different corpora or with different tokenizers.
    """
    for name in ("min_count", "unit", "classes", "include_special", "compat", "baseline"):
        if before.settings[name] != after.settings[name]:
            raise InputError(
                f"was measured with {name} {before.settings[name]}, the other with {after.settings[name]}",
                field=before.model,
            )
    first, second = before.types, after.types
    if first.tokens != second.tokens or (first.counts != second.counts).any():
        where = {token: row for row, token in enumerate(second.tokens)}
        same = sum(token in where for token in first.tokens)
        if before.settings["unit"] == "word" and same >= 0.9 * max(len(first.tokens), len(second.tokens)):
            return _compare_rows(
                before, after, seed
            )  # one model cut a sentence that the other one read whole
        raise InputError(
            f"the models' types differ ({same} of {len(first.tokens)} and {len(second.tokens)} are alike): "
            "another tokenizer or corpus; with another tokenizer compare words, unit='word' (--unit word)",
            field="tokenizer",
        )
    return _compare_rows(before, after, seed)


def _compare_rows(before: GeometryReport, after: GeometryReport, seed: int) -> ShiftReport:
    first, second = before.types, after.types
    where = {token: row for row, token in enumerate(second.tokens)}
    rows = [
        (row, where[token])
        for row, token in enumerate(first.tokens)
        if token in where and first.analysed[row]
    ]
    if not rows:
        raise InputError("the models have no analysed types in common", field="tokenizer")
    ours, theirs = (np.array(column) for column in zip(*rows, strict=True))
    delta = second.self_similarity[-1, theirs] - first.self_similarity[-1, ours]
    kept = np.isfinite(delta)
    ours, delta = ours[kept], delta[kept]
    baselines = [
        report.last("self_similarity") - report.last("adjusted_self_similarity") for report in (before, after)
    ]
    adjusted = delta - (baselines[1] - baselines[0])
    classes = [first.classes[row] for row in ours]
    counts = first.counts[ours]
    raw, level = (group_test(values, classes, counts, seed=seed) for values in (delta, adjusted))
    tokens = [first.tokens[row] for row in ours]
    return ShiftReport(before, after, tokens, classes, counts, delta, adjusted, raw, level)


def group_test(
    delta: Float[np.ndarray, " types"],
    classes: Sequence[str],
    counts: Int[np.ndarray, " types"],
    *,
    seed: int = 0,
) -> GroupTest:
    """Compare the change of semantic types with that of functional ones, and tell frequency's part.

    Args:
        delta: Change of each type.
        classes: Of each type.
        counts: Occurrences of each type.
        seed: Of bootstrap and permutations.

    Raises:
        InputError: There are fewer than 2 of either.
    """
    names = np.array(classes)
    semantic, functional = delta[names == "semantic"], delta[names == "functional"]
    if min(len(semantic), len(functional)) < 2:
        raise InputError(
            "expected 2 or more semantic and functional types with enough occurrences: use a larger "
            "corpus or a smaller min_count",
            field="types",
            value=(len(semantic), len(functional)),
        )
    generator = np.random.default_rng(seed)
    drawn = [
        values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
        for values in (semantic, functional)
    ]
    both = (names == "semantic") | (names == "functional")
    values, member = delta[both], names[both] == "semantic"
    logs = np.log(counts[both].astype(np.float64))
    strata = np.searchsorted(np.quantile(logs, np.linspace(0, 1, STRATA + 1)[1:-1]), logs, side="right")
    line: Any = stats.linregress(np.log(counts.astype(np.float64)), delta)
    adjusted, error = _at_equal_frequency(values, member, logs)
    one = np.zeros(len(values), dtype=np.int64)
    return GroupTest(
        semantic=float(semantic.mean()),
        semantic_interval=_interval(drawn[0]),
        functional=float(functional.mean()),
        functional_interval=_interval(drawn[1]),
        difference=float(semantic.mean() - functional.mean()),
        difference_interval=_interval(drawn[0] - drawn[1]),
        p=_permutation_p(values, member, one, generator),
        matched_difference=_difference(values, member[None], strata)[0],
        matched_p=_permutation_p(values, member, strata, generator),
        slope=float(line.slope),
        slope_p=float(line.pvalue),
        adjusted_difference=adjusted,
        adjusted_error=error,
        counts=(len(semantic), len(functional)),
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _difference(values: np.ndarray, member: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Mean of members less that of others within strata, weighted by `n m / (n + m)`; a row a membership."""
    total, weights = np.zeros(len(member)), np.zeros(len(member))
    for stratum in np.unique(strata):
        inside = member[:, strata == stratum]
        some = values[strata == stratum]
        ours = inside.sum(1)
        others = inside.shape[1] - ours
        weight = ours * others / inside.shape[1]
        sums = inside @ some
        means = sums / np.maximum(ours, 1) - (some.sum() - sums) / np.maximum(others, 1)
        total += weight * means
        weights += weight
    return np.divide(total, weights, out=np.full(len(member), np.nan), where=weights > 0)


def _permutation_p(
    values: np.ndarray, member: np.ndarray, strata: np.ndarray, generator: np.random.Generator
) -> float:
    observed = _difference(values, member[None], strata)[0]
    shuffled = np.empty((PERMUTATIONS, len(values)), dtype=bool)
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        keys = generator.random((PERMUTATIONS, len(inside)))
        shuffled[:, inside] = member[inside][np.argsort(keys, axis=1)]
    extreme = np.abs(_difference(values, shuffled, strata)) >= abs(observed) - 1e-12
    return float((extreme.sum() + 1) / (PERMUTATIONS + 1))


def _at_equal_frequency(values: np.ndarray, member: np.ndarray, logs: np.ndarray) -> tuple[float, float]:
    """Coefficient of membership beside log frequency, and its standard error."""
    design = np.stack([np.ones(len(values)), member, logs], axis=1)
    inverse = np.linalg.pinv(design.T @ design)
    found = inverse @ design.T @ values
    residual = values - design @ found
    variance = float(residual @ residual) / max(1, len(values) - 3)
    return float(found[1]), float(np.sqrt(variance * inverse[1, 1]))


def same_sense_cosines(
    model: Any, table: Sequence[tuple[str, str, str]], *, tokenizer: Any = None
) -> Float[np.ndarray, " pairs"]:
    """Cosine of a word's states in two contexts, last layer, for each row of (word, sentence, sentence).

    Raises:
        InputError: A sentence does not hold its word.
    """
    if not table:
        raise InputError("expected at least one row", field="same_sense", value=0)
    encoder = load_encoder(model, tokenizer)
    sides = []
    for column in (1, 2):
        vectors = []
        for number, row in enumerate(table):
            tokens = tokenize(encoder, [row[column]], words=True)
            texts, words = (tokens.texts or [[]])[0], (tokens.words or [np.zeros(0)])[0]
            if row[0].lower() not in texts:
                raise InputError(
                    f"row {number + 1}: the sentence {row[column]!r} has no such word",
                    field="same_sense",
                    value=row[0],
                )
            ids, mask = pad(tokens.ids, 0)
            with encoder.measuring():
                states = encoder.hidden_states(ids, mask)[-1][0].float().cpu()
            inside = torch.as_tensor(words == texts.index(row[0].lower()))
            vectors.append(torch.nn.functional.normalize(states[inside].mean(0), dim=0))
        sides.append(torch.stack(vectors))
    return (sides[0] * sides[1]).sum(1).double().numpy()


def shift_rows(shift: ShiftReport) -> list[tuple[str, float, float, float]]:
    """The table of the paper's findings: (what, before, after, change), at the last layer."""
    names: Mapping[str, str] = {
        "anisotropy": "anisotropy",
        "intra_sentence": "intra-sentence similarity",
        "adjusted_intra_sentence": "intra-sentence similarity, adjusted",
        "self_similarity": "self-similarity",
        "adjusted_self_similarity": "self-similarity, adjusted",
        "norm": "norm",
        "mean_distance": "mean's distance from the origin",
        "isoscore_tokens": "IsoScore of tokens",
        "isoscore_sentences": "IsoScore of sentences",
        "sentence_cosine": "mean cosine of sentences",
        "uniformity": "uniformity of sentences",
        "top_dimension_share": "share of the greatest dimension",
    }
    rows = []
    for name, label in names.items():
        values = [
            float(report.measures[name][-1]) if name in report.measures else float("nan")
            for report in (shift.before, shift.after)
        ]
        rows.append((label, *values, values[1] - values[0]))
    for kind in ("semantic", "functional"):
        for name, label in (("self_similarity", ""), ("adjusted_self_similarity", ", adjusted")):
            values = [
                float(report.by_class[kind][name][-1]) if name in report.by_class[kind] else float("nan")
                for report in (shift.before, shift.after)
            ]
            rows.append((f"self-similarity of {kind} types{label}", *values, values[1] - values[0]))
    return rows
