"""LEAD in sentence-transformers' Trainer: a loss, and a collator that brings it the texts for the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from lead_kd.candidates import candidate_mask, own_block, text_number
from lead_kd.minilm import MiniLM
from lead_kd.objectives import (
    Candidates,
    Embedding,
    Lead,
    Objective,
    Regression,
    check_candidates,
    layers_of,
)
from lead_kd.scorers import Batch, DualEncoder, Scorer, to_device, vector_scores
from lead_kd.scores import gather_plain
from lead_kd.selection import LayerSchedule, Strategy
from shared_core import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

_TEXT = "lead_text"


@dataclass
class LeadDataCollator(SentenceTransformerDataCollator):
    """Tokenizes for the student as usual, and keeps each column's texts for the teacher's own tokenizer."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows."""
        batch = super().__call__(features)
        for name in features[0] if features else ():
            if isinstance(features[0][name], str) and name != "dataset_name":
                batch[f"{name}_{_TEXT}"] = [row[name] for row in features]
        return batch


class LeadLoss(nn.Module):
    """LEAD as a loss of SentenceTransformerTrainer, with a frozen teacher of any width, depth and tokenizer.

    ============================================  ======
    Inputs                                        Labels
    ============================================  ======
    query, positive                               none
    query, positive, negative_1, ..., negative_m  none
    ============================================  ======

    All passages of the batch are candidates of all its queries, those of other processes too, but for copies
    and other positives of the same query. The trainer needs `LeadDataCollator`, since the loss sees the
    student's tokens only, and `follow_steps`, by which pairs of layers are drawn anew.

    Beside sentence-transformers' own losses: MultipleNegativesRankingLoss is L_stu, DistillKLDivLoss L_rep.
    A teacher that trains too, as published, is `lead_kd.distill(..., co_train=True)`.

    Args:
        model: The student.
        teacher: Any scorer: `DualEncoder`, `CachedTeacher`, `ColBERT`, `CrossEncoderScorer`.
        pairs: Pairs of layers, K; 5, or as many as the smaller model has.
        strategy: How pairs are drawn; see `select_layers`.
        every: Steps between draws.
        layer_temperature: Of the layers' weights; by default 1 where the teacher's scores are scaled cosines,
            else the official scripts' 10.
        temperature: Of the distributions.
        seed: Of the draws.
        objective: Another objective in the place of LEAD, for comparison; one that reads scores alone.

    Raises:
        InputError: Models do not fit, or the objective trains the teacher or reads features.

    Source: Sun et al., WSDM 2024, arXiv 2212.05225.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        teacher: Scorer,
        pairs: int | None = None,
        strategy: Strategy = "random",
        every: int = 10,
        layer_temperature: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.model = model  # trainers put their wrapped model here
        # In tuples, since trainers replace every model that they find among a loss's children by the student.
        self._student = (DualEncoder(model),)
        self._teacher = (teacher.eval().requires_grad_(False),)
        depth = min(teacher.n_layers, self._student[0].n_layers)
        count = min(5, depth) if pairs is None else pairs
        self.schedule = LayerSchedule(
            teacher.n_layers, self._student[0].n_layers, count, strategy, every, seed
        )
        if layer_temperature is None:
            layer_temperature = default_layer_temperature(teacher)
        self.objective = objective or Lead(layer_temperature, temperature)
        if self.objective.co_train or isinstance(self.objective, MiniLM | Embedding | Regression):
            raise InputError(
                "only reads scores of a frozen teacher; train with lead_kd.distill",
                field="objective",
                value=type(self.objective).__name__,
            )
        self.step = 0
        self.log: dict[str, float] = {}

    def forward(
        self, sentence_features: list[dict[str, Any]], labels: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Compute the loss of a batch; its terms are then in `log`."""
        student, teacher = self._student[0], self._teacher[0]
        if len(sentence_features) < 2:
            raise InputError(
                "expected a query column and a positive column", field="columns", value=len(sentence_features)
            )
        texts = [_texts(features) for features in sentence_features]
        pairs = self.schedule.pairs(self.step)
        of_teacher, of_student = layers_of(pairs)
        per_query = len(texts) - 1

        q_layers, q_final = student.vectors(_tokens(sentence_features[0]), of_student, self.model)
        p_layers, p_final = student.vectors(
            _one_batch(sentence_features[1:], student.model.tokenizer.pad_token_id or 0),
            of_student,
            self.model,
        )
        scores = vector_scores(
            q_layers, q_final, _by_query(p_layers, per_query), _by_query(p_final, per_query), student.scale
        )
        passages = [texts[1 + column][row] for row in range(len(texts[0])) for column in range(per_query)]
        on = self._candidates(texts[0], passages, per_query, q_final.device)
        told = None
        if self.objective.needs_teacher:
            teacher.to(q_final.device)
            with torch.no_grad():
                told = teacher(to_device(teacher.collate(texts[0], passages), q_final.device), of_teacher)
            scores, on = check_candidates(scores, told, on)
        loss = self.objective(scores, told, on, pairs)
        self.log = loss.log
        return loss.total

    def _candidates(
        self, queries: Sequence[str], passages: Sequence[str], per_query: int, device: torch.device
    ) -> Candidates:
        ids = torch.tensor([text_number("passage", text) for text in passages], device=device)
        asked = torch.tensor([text_number("query", text) for text in queries], device=device)
        # The same query may stand in another row, or in another process, with another positive.
        all_asked, all_positives = gather_plain(asked), gather_plain(ids[::per_query].contiguous())
        positives = torch.where(asked[:, None] == all_asked, all_positives, -1)
        own = own_block(len(queries), per_query, device) + _rank() * len(ids)
        mask = candidate_mask(gather_plain(ids), positives, own[:, 0])
        return Candidates(own[:, 0], mask, own)


class _Follow(TrainerCallback):
    def __init__(self, loss: LeadLoss) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.step = state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            terms = {f"lead_{name}": value for name, value in self.loss.log.items()}
            logs.update(terms)
            state.log_history[-1].update(terms)


def follow_steps(trainer: SentenceTransformerTrainer, loss: LeadLoss) -> None:
    """Let a loss follow a trainer's steps, those of a resumed run too, and put its terms into the log.

    The trainer's prompts go to a `LeadDataCollator` that has none: a trainer hands them only to a collator of
    its own making.
    """
    collator = trainer.data_collator
    if isinstance(collator, LeadDataCollator) and not collator.prompts and trainer.args.prompts:
        collator.prompts = trainer.args.prompts
    trainer.add_callback(_Follow(loss))


def default_layer_temperature(teacher: Scorer) -> float:
    """1 for scaled cosines, whose cross-entropies are small; the official scripts' 10 for raw products."""
    return 1.0 if getattr(teacher, "normalized", getattr(teacher, "scale", 1.0) > 1) else 10.0


def _tokens(features: dict[str, Any]) -> Batch:
    return {name: value for name, value in features.items() if name != _TEXT}


def _texts(features: dict[str, Any]) -> list[str]:
    if _TEXT not in features:
        raise InputError(
            "the teacher needs texts: give the trainer data_collator=LeadDataCollator(model.preprocess)",
            field="data_collator",
        )
    return features[_TEXT]


def _one_batch(columns: Sequence[dict[str, Any]], pad_id: int) -> Batch:
    """Join the passages' columns into one batch, so that they take one forward pass."""
    joined: Batch = {}
    for name, first in columns[0].items():
        if name == _TEXT:
            continue
        if isinstance(first, Tensor) and first.ndim == 2:
            parts = [column[name] for column in columns]
            longest = max(part.shape[1] for part in parts)
            value = pad_id if name == "input_ids" else 0
            joined[name] = torch.cat(
                [F.pad(part, (0, longest - part.shape[1]), value=value) for part in parts]
            )
        else:
            joined[name] = first
    return joined


def _by_query(vectors: Tensor, columns: int) -> Tensor:
    """Reorder rows from [all positives, all first negatives, ...] to [q1+, q1-1, ..., q2+, ...]."""
    return vectors.view(columns, -1, *vectors.shape[1:]).transpose(0, 1).flatten(0, 1)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0
