"""Geometry along training: a callback and an evaluator for the trainers of both libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback

from isocse.analysis import analyze
from isocse.encoders import load_encoder
from isocse.options import make_options
from isocse.pairs import Judged
from isocse.report import GeometryReport
from shared_core import InputError, files


def log_steps(last: int) -> list[int]:
    """Steps 0, 1, 2, 4, 8, ... and the last one: most of the change happens in the first tens of steps.

    >>> log_steps(20)
    [0, 1, 2, 4, 8, 16, 20]
    """
    found = [0]
    step = 1
    while step < last:
        found.append(step)
        step *= 2
    return [*found, last] if last > 0 else found


def flat_measures(report: GeometryReport) -> dict[str, float]:
    """Measures of the last layer, and self-similarity and norm by class, as one flat dict."""
    found = {name: float(values[-1]) for name, values in report.measures.items() if np.isfinite(values[-1])}
    for kind in ("semantic", "functional"):
        for name in ("self_similarity", "adjusted_self_similarity", "norm"):
            values = report.by_class[kind].get(name)
            if values is not None and np.isfinite(values[-1]):
                found[f"{name}_{kind}"] = float(values[-1])
    return found


class GeometryCallback(TrainerCallback):
    """Measures the model's geometry at some steps of a training run.

    Args:
        sentences: The corpus; held-out sentences, a few hundred.
        steps: When; `log_steps` of the run's last step where None.
        tokenizer: Of a transformers model; a SentenceTransformer has its own.
        judged: Texts with human similarities, for a Spearman correlation at each of the steps.
        path: File to which each record is appended as a line of JSON.
        max_length: Longest input in tokens; the model's own where None.
        extra: Called with the model at each of the steps; what it gives is added to the record.
        options: Of `analyze`. Only the last layer is measured if not told otherwise.

    Attributes:
        history: The records: "step", then measures.
        reports: The `GeometryReport` of each.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        *,
        steps: Sequence[int] | None = None,
        tokenizer: Any = None,
        judged: Judged | None = None,
        path: str | os.PathLike[str] | None = None,
        max_length: int | None = None,
        extra: Callable[[Any], dict[str, float]] | None = None,
        **options: Any,
    ) -> None:
        make_options(options)  # a wrong one is told before training
        self.sentences = list(sentences)
        self.steps = None if steps is None else sorted(set(steps))
        self.tokenizer, self.judged, self.extra = tokenizer, judged, extra
        self.max_length = max_length
        self.path = None if path is None else Path(path)
        self.options = {"layers": [-1], "detail": False} | options
        self.history: list[dict[str, float]] = []
        self.reports: list[GeometryReport] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure before the first step, or take up the records of an interrupted run."""
        if self.steps is None:
            self.steps = log_steps(state.max_steps)
        if self.path is not None and state.global_step:
            self.history = [row for row in read_history(self.path) if row["step"] <= state.global_step]
            self._write()
        if not self.history and state.global_step in self.steps:
            self._measure(state.global_step, given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure after some of the steps."""
        if state.global_step in (self.steps or ()):
            self._measure(state.global_step, given["model"])

    def _measure(self, step: int, model: Any) -> None:
        report = analyze(
            model, self.sentences, tokenizer=self.tokenizer, max_length=self.max_length, **self.options
        )
        record: dict[str, float] = {"step": step, **flat_measures(report)}
        if self.judged is not None:
            record["similarity_spearman"] = similarity_spearman(
                model, self.judged, tokenizer=self.tokenizer, pooling=self.options.get("pooling")
            )
        if self.extra is not None:
            record |= self.extra(model)
        self.history.append(record)
        self.reports.append(report)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.history))


def read_history(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The records that a `GeometryCallback` wrote.

    Raises:
        InputError: The file is missing or holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number}: is not JSON: {error}", file=path) from error
        if not isinstance(row, dict) or "step" not in row:
            raise InputError(f"line {number}: expected an object with a step", file=path)
        rows.append(row)
    return rows


class GeometryEvaluator(BaseEvaluator):
    """Geometry as an evaluator of sentence-transformers: a flat dict with one measure as the primary one.

    Args:
        sentences: The corpus.
        name: Before each measure's name.
        primary: The measure by which the best checkpoint is chosen.
        greater_is_better: Whether more of it is better.
        options: Of `analyze`.
    """

    def __init__(
        self,
        sentences: Sequence[str],
        *,
        name: str = "geometry",
        primary: str = "anisotropy",
        greater_is_better: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        make_options(options)
        self.sentences, self.name = list(sentences), name
        self.options = {"layers": [-1], "detail": False} | options
        self.primary_metric = primary
        self.greater_is_better = greater_is_better

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure a model; with an output folder, add a line to ``<name>_results.jsonl`` there."""
        found = flat_measures(analyze(model, self.sentences, **self.options))
        if output_path is not None:
            path = Path(output_path) / f"{self.name}_results.jsonl"
            before = path.read_text(encoding="utf-8") if path.is_file() else ""
            line = json.dumps({"epoch": epoch, "step": steps} | found)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, f"{before}{line}\n")
        primary = self.primary_metric
        if primary is not None and primary.removeprefix(f"{self.name}_") not in found:
            raise InputError(f"expected one of {', '.join(found)}", field="primary", value=primary)
        return self.prefix_name_to_metrics(found, self.name)


def similarity_spearman(
    model: Any, judged: Judged, *, tokenizer: Any = None, pooling: str | None = None
) -> float:
    """Spearman correlation of the cosines of sentence vectors with human similarities."""
    from scipy.stats import spearmanr

    texts = list(dict.fromkeys([*judged.first, *judged.second]))
    vectors = sentence_vectors(model, texts, tokenizer=tokenizer, pooling=pooling)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    where = {text: row for row, text in enumerate(texts)}
    first, second = (units[[where[text] for text in side]] for side in (judged.first, judged.second))
    found: Any = spearmanr((first * second).sum(1), judged.scores)
    return float(found.statistic)


def sentence_vectors(
    model: Any,
    sentences: Sequence[str],
    *,
    tokenizer: Any = None,
    pooling: str | None = None,
    layer: int = -1,
    batch_size: int = 32,
) -> np.ndarray:
    """Vectors of sentences, (sentences, d), from the states of a layer; not normalised."""
    import torch

    from isocse.encoders import pad, pool, tokenize

    encoder = load_encoder(model, tokenizer)
    tokens = tokenize(encoder, sentences)
    order = np.argsort([-len(ids) for ids in tokens.ids], kind="stable")
    rows: list[Any] = [None] * len(sentences)
    with encoder.measuring():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = pad([tokens.ids[n] for n in chosen], int(encoder.tokenizer.pad_token_id or 0))
            h = encoder.hidden_states(ids, mask)[layer]
            pooled = pool(h, mask.to(h.device), pooling or encoder.pooling).float().cpu()
            for n, vector in zip(chosen, pooled, strict=True):
                rows[n] = vector
    return torch.stack(rows).double().numpy()
