"""What a step minimizes: LEAD, and the rivals that it is compared with.

Each objective takes the scores of student and teacher over the same candidates. Rivals that align features
have the same cross-entropy and response terms as LEAD, so that what differs is the features' term alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lead_kd.losses import (
    Pairs,
    TermWeights,
    lead_loss,
    listwise_kl,
    log_distribution,
    ranking_loss,
)
from lead_kd.scores import Scores
from shared_core import InputError

Name = Literal["lead", "none", "response", "margin-mse", "listwise", "regression", "embedding", "minilm"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Candidates:
    """What is scored in a step.

    Attributes:
        target: Column of each query's positive among all candidates.
        mask: True for what is a candidate of a query.
        own: Columns of each query's own passages, its positive first.
    """

    target: Int[Tensor, " queries"]
    mask: Bool[Tensor, "queries passages"]
    own: Int[Tensor, "queries per_query"]

    def block(self) -> Candidates:
        """Only each query's own passages: what a cross-encoder scores.

        Raises:
            InputError: A query has its positive alone, from which nothing can be told.
        """
        count, per_query = self.own.shape
        if per_query < 2:
            raise InputError("expected at least one negative a query", field="negatives", value=0)
        columns = torch.arange(per_query, device=self.own.device).expand(count, per_query)
        return Candidates(torch.zeros_like(self.target), self.mask.gather(1, self.own), columns)

    def cut(self, scores: Scores) -> Scores:
        """Take the scores of each query's own passages out of those of all."""
        layers = scores.layers.gather(2, self.own.expand(len(scores.layers), -1, -1))
        return Scores(layers, scores.final.gather(1, self.own))


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step, and numbers for the log."""

    total: Float[Tensor, ""]
    log: dict[str, float] = field(default_factory=dict)
    weights: Float[Tensor, " pairs"] | None = None


class Objective(nn.Module):
    """The loss of one method; some have weights of their own, which train with the student.

    Attributes:
        needs_teacher: Whether a teacher is asked at all.
        needs_pairs: Whether pairs of layers are drawn for it.
    """

    needs_teacher = True
    needs_pairs = False
    co_train = False  # whether targets have gradients

    def settings(self) -> dict[str, Any]:
        """Name what was chosen about the loss: a run that goes on must have the same."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, int | float | str)}
        plain.pop("training", None)
        coefficients = getattr(self, "coefficients", None)
        return plain if coefficients is None else {**plain, "coefficients": asdict(coefficients)}

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """Compute the loss.

        Args:
            student: Layers are the pairs' student layers, in the pairs' order.
            teacher: Layers are the pairs' teacher layers.
            on: What is scored.
            pairs: (teacher layer, student layer), for objectives that keep something for each.
        """
        raise TypeError(f"{type(self).__name__} has no loss")


class Contrastive(Objective):
    """No distillation: the cross-entropy of the student's scores, L_stu."""

    needs_teacher = False

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """L_stu."""
        loss = ranking_loss(log_distribution(student.final, on.mask), on.target)
        return StepLoss(loss, {"stu": loss.item()})


class Response(Objective):
    """Response distillation: L_stu + weight · KL(teacher || student) of the final scores.

    Args:
        weight: Of the KL; 2 shows what more of the same term would do.
        temperature: Of both distributions; the KL is multiplied by its square.
        own_only: Over each query's own passages alone, as RocketQA v2's listwise distillation.
        co_train: Whether the teacher trains too; the KL then has both directions, beside L_tch.
    """

    def __init__(
        self, weight: float = 1.0, temperature: float = 1.0, own_only: bool = False, co_train: bool = False
    ) -> None:
        super().__init__()
        self.weight, self.temperature, self.own_only, self.co_train = weight, temperature, own_only, co_train

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """L_stu + L_rep."""
        assert teacher is not None
        stu = ranking_loss(log_distribution(student.final, on.mask), on.target)
        if self.own_only and student.final.shape != on.own.shape:
            student, teacher, on = on.cut(student), on.cut(teacher), on.block()
        of_teacher = teacher.final if self.co_train else teacher.final.detach()
        t = log_distribution(of_teacher, on.mask, self.temperature)
        s = log_distribution(student.final, on.mask, self.temperature)
        rep = listwise_kl(t, s) * self.temperature**2
        total = stu
        if self.co_train:
            rep = rep + listwise_kl(s, t) * self.temperature**2
            total = total + ranking_loss(log_distribution(of_teacher, on.mask), on.target)
        return StepLoss(total + self.weight * rep, {"stu": stu.item(), "rep": rep.item()})


class MarginMSE(Objective):
    """Margin-MSE (Hofstätter et al. 2020): the squared difference of positive-minus-negative margins.

    Margins are those between a query's positive and its own negatives; there is no other term, as published.
    """

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """Mean over queries and their negatives of ((s+ - s-) - (t+ - t-))²."""
        assert teacher is not None
        if on.own.shape[1] < 2:
            raise InputError("margin-mse needs at least one negative a query", field="negatives", value=0)
        s, t = (scores.final.float().gather(1, on.own) for scores in (student, teacher))
        t = t.detach()
        difference = (s[:, :1] - s[:, 1:]) - (t[:, :1] - t[:, 1:])
        counts = on.mask.gather(1, on.own)[:, 1:]
        loss = (difference.square() * counts).sum() / counts.sum().clamp(min=1)
        return StepLoss(loss, {"margin": loss.item()})


class Regression(Objective):
    """FitNet's and TinyBERT's way: the mean squared error of projected features, beside L_stu and L_rep.

    Each of the student's layers has a projection of its own into the teacher's width.

    Args:
        student_dim: Width of the student's features.
        teacher_dim: Width of the teacher's.
        student_layers: The student's layers.
        generator: Of the projections' first values.
    """

    needs_pairs = True

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        student_layers: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        start = torch.randn(student_layers, student_dim, teacher_dim, generator=generator)
        self.projections = nn.Parameter(start / student_dim**0.5)
        self.response = Response()

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """L_stu + L_rep + the mean over pairs and texts of |W h_s - h_t|²."""
        assert teacher is not None
        both = self.response(student, teacher, on, pairs)
        chosen = self.projections[[layer for _, layer in pairs]]
        error = regression_error(student, teacher, chosen, on.own.shape[1])
        return StepLoss(both.total + error, {**both.log, "mse": error.item()})


class Embedding(Objective):
    """EmbedDistill's way (Kim et al. 2023): only the final embeddings are regressed, beside L_stu and L_rep.

    Args:
        student_dim: Width of the student's features.
        teacher_dim: Width of the teacher's; a projection is learned where they differ.
        generator: Of the projection's first values.
    """

    needs_pairs = True  # the last layer of each

    def __init__(self, student_dim: int, teacher_dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.response = Response()
        self.projection = None
        if student_dim != teacher_dim:
            start = torch.randn(1, student_dim, teacher_dim, generator=generator) / student_dim**0.5
            self.projection = nn.Parameter(start)

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """L_stu + L_rep + the mean over texts of |h_s - h_t|²."""
        assert teacher is not None
        both = self.response(student, teacher, on, pairs)
        error = regression_error(student, teacher, self.projection, on.own.shape[1])
        return StepLoss(both.total + error, {**both.log, "mse": error.item()})


def regression_error(
    student: Scores,
    teacher: Scores,
    projections: Float[Tensor, "layers dim teacher_dim"] | None,
    per_query: int,
) -> Float[Tensor, ""]:
    """Squared distance of projected features, a sum over the width and a mean over layers and texts.

    Args:
        student: With the vectors of this process's queries and of all processes' passages.
        teacher: Likewise.
        projections: Of the student's features; None for none.
        per_query: Passages a query.

    Raises:
        InputError: The teacher has no vector for each layer and text (a cross-encoder, ColBERT).
    """
    if student.vectors is None or teacher.vectors is None:
        raise InputError("regression of features needs a dual encoder as teacher", field="teacher")
    means = []
    for of_student, of_teacher in zip(student.vectors, teacher.vectors, strict=True):
        projected = of_student if projections is None else of_student @ projections
        if projected.shape != of_teacher.shape:
            raise InputError(
                f"expected features of shape {tuple(of_teacher.shape)}, the teacher's",
                field="student",
                value=tuple(projected.shape),
            )
        means.append((projected.float() - of_teacher.detach().float()).square().sum(-1).mean())
    of_queries, of_passages = means
    # Each text weighs the same, also where only this process's queries are here: 1 beside per_query passages.
    return (of_queries + per_query * of_passages) / (1 + per_query)


class Lead(Objective):
    """LEAD: every layer's distribution over the candidates is aligned; see `lead_kd.lead_loss`.

    Args:
        layer_temperature: Of the layers' weights.
        temperature: Of the distributions.
        co_train: Whether the teacher trains too, as published.
        reweight: Whether layers are weighted by how well they rank.
        coefficients: Of the terms.
    """

    needs_pairs = True

    def __init__(
        self,
        layer_temperature: float = 10.0,
        temperature: float = 1.0,
        co_train: bool = False,
        reweight: bool = True,
        coefficients: TermWeights | None = None,
    ) -> None:
        super().__init__()
        self.layer_temperature, self.temperature = layer_temperature, temperature
        self.co_train, self.reweight, self.coefficients = co_train, reweight, coefficients

    def forward(self, student: Scores, teacher: Scores | None, on: Candidates, pairs: Pairs) -> StepLoss:
        """L_stu + L_tch + L_rep + L_lyr."""
        assert teacher is not None
        terms = lead_loss(
            student.layers,
            teacher.layers,
            on.target,
            [(number, number) for number in range(len(pairs))],
            layer_temperature=self.layer_temperature,
            temperature=self.temperature,
            mask=on.mask,
            student_final=student.final,
            teacher_final=teacher.final,
            co_train=self.co_train,
            reweight=self.reweight,
            coefficients=self.coefficients,
        )
        log = {name: getattr(terms, name).item() for name in ("stu", "tch", "rep", "lyr")}
        if terms.peaked > 0.5:
            warnings.warn(  # once a place, as Python's filters have it
                "most of the teacher's distributions are one candidate and nothing else, so its order of "
                "all others is lost; try a temperature above 1",
                stacklevel=2,
            )
        return StepLoss(terms.total, {**log, "peaked": terms.peaked}, terms.weights)


def check_candidates(student: Scores, teacher: Scores, on: Candidates) -> tuple[Scores, Candidates]:
    """Bring the student's scores to the teacher's candidates: its own block for a cross-encoder.

    Raises:
        InputError: The teacher scores other queries or candidates than the student.
    """
    if teacher.final.shape == student.final.shape:
        return student, on
    if teacher.final.shape == on.own.shape:
        return on.cut(student), on.block()
    raise InputError(
        f"expected scores of shape {tuple(student.final.shape)}, or a cross-encoder's {tuple(on.own.shape)}",
        field="teacher",
        value=tuple(teacher.final.shape),
    )


def layers_of(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Split pairs into the teacher's layers and the student's."""
    return [teacher for teacher, _ in pairs], [student for _, student in pairs]
