"""LEAD's losses on plain tensors, in the order of the paper.

A step has B queries and P passages, all of them candidates of every query. Scores of a layer are (B, P),
those of all layers (layers, B, P). Layer l of the paper is index l - 1 here; the embeddings are not a layer.

Sun, Liu, Gong, Dong, Lu, Zhang, Yang, Majumder, Duan: "LEAD: Liberal Feature-based Distillation for Dense
Retrieval", WSDM 2024, arXiv 2212.05225.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_core import InputError

Pairs = Sequence[tuple[int, int]]
"""Pairs (teacher layer, student layer), as indices from 0."""

PEAKED = 1e-6
"""A query's distribution whose other candidates have less than this together carries no ranking."""


@dataclass(frozen=True)
class LeadTerms:
    """The loss of a step and its parts.

    Attributes:
        total: What is differentiated.
        stu: Cross-entropy of the student's final scores.
        tch: Cross-entropy of the teacher's final scores; a part of the total only when the teacher trains.
        rep: KL between the final scores, in both directions when the teacher trains.
        lyr: Weighted sum of the layers' KL.
        weights: The layers' weights; they sum to 1, without a gradient.
        layer_kl: KL of each pair of layers.
        peaked: Share of (query, teacher layer) whose distribution is one candidate and nothing else.
    """

    total: Float[Tensor, ""]
    stu: Float[Tensor, ""]
    tch: Float[Tensor, ""]
    rep: Float[Tensor, ""]
    lyr: Float[Tensor, ""]
    weights: Float[Tensor, " pairs"]
    layer_kl: Float[Tensor, " pairs"]
    peaked: float


@dataclass(frozen=True)
class TermWeights:
    """Coefficients of the four terms; the paper's are all 1."""

    stu: float = 1.0
    tch: float = 1.0
    rep: float = 1.0
    lyr: float = 1.0


def log_distribution(
    scores: Float[Tensor, "*layers queries passages"],
    mask: Bool[Tensor, "queries passages"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "*layers queries passages"]:
    """Log-softmax over the candidates, in float32 or wider; candidates outside the mask get (almost) nothing.

    Args:
        scores: Of any floating dtype.
        mask: True for what is a candidate of a query; None where all are.
        temperature: Divides the scores; above 0.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    wide = wide / temperature
    if mask is not None:
        wide = wide.masked_fill(~mask, torch.finfo(wide.dtype).min)
    return wide.log_softmax(-1)


def ranking_loss(
    log_probabilities: Float[Tensor, "*layers queries passages"], target: Int[Tensor, " queries"]
) -> Float[Tensor, "*layers"]:
    """Cross-entropy with the positive's column as target, a mean over queries."""
    columns = target.expand(*log_probabilities.shape[:-1]).unsqueeze(-1)
    return -log_probabilities.gather(-1, columns).squeeze(-1).mean(-1)


def listwise_kl(
    target_log: Float[Tensor, "*layers queries passages"],
    input_log: Float[Tensor, "*layers queries passages"],
) -> Float[Tensor, "*layers"]:
    """KL(target || input): the sum over candidates of t log(t / s), a mean over queries.

    Args:
        target_log: log t.
        input_log: log s, which moves towards t.
    """
    return (target_log.exp() * (target_log - input_log)).sum(-1).mean(-1)


def layer_weights(
    teacher_log: Float[Tensor, "pairs queries passages"], target: Int[Tensor, " queries"], temperature: float
) -> Float[Tensor, " pairs"]:
    """Weights of the teacher's layers: a softmax of -CE / temperature, without a gradient.

    A layer that ranks well has a low cross-entropy and a large weight. Each process takes the cross-entropy
    over its own queries, as the official code does.

    Args:
        teacher_log: Log distributions of the selected teacher layers.
        target: Column of each query's positive.
        temperature: T_layer. The official scripts have 10, for raw dot products whose cross-entropy is in the
            tens; for cosines times 20 about 0.5 to 1 tells layers apart.
    """
    with torch.no_grad():
        return (-ranking_loss(teacher_log, target) / temperature).softmax(0)


def lead_loss(
    student_scores: Float[Tensor, "student_layers queries passages"],
    teacher_scores: Float[Tensor, "teacher_layers _ _"],  # queries and passages, checked here
    target: Int[Tensor, " queries"],
    pairs: Pairs,
    *,
    layer_temperature: float = 10.0,
    temperature: float = 1.0,
    mask: Bool[Tensor, "queries passages"] | None = None,
    student_final: Float[Tensor, "queries passages"] | None = None,
    teacher_final: Float[Tensor, "queries passages"] | None = None,
    co_train: bool = False,
    reweight: bool = True,
    coefficients: TermWeights | None = None,
) -> LeadTerms:
    """The loss of LEAD: L_stu + L_tch + L_rep + L_lyr.

    Args:
        student_scores: Scores from each of the student's layers.
        teacher_scores: Scores from each of the teacher's layers.
        target: Column of each query's positive.
        pairs: Which teacher layer teaches which student layer; see `select_layers`.
        layer_temperature: Of the layers' weights; see `layer_weights`.
        temperature: Of the distributions that are aligned, both sides; the KL terms are multiplied by its
            square, so that their gradients keep their size (Hinton et al. 2015).
        mask: True for what is a candidate of a query; see `candidate_mask`.
        student_final: The student's final scores; its last layer's where None.
        teacher_final: The teacher's final scores; its last layer's where None.
        co_train: Whether the teacher trains too, as published: its own ranking loss counts, the response is
            aligned in both directions, and targets have gradients. Else the teacher is only read.
        reweight: Whether layers are weighted by how well they rank; else each has the weight 1 / K.
        coefficients: Of the terms.

    Raises:
        InputError: A pair names a layer that is not there, there is no pair, shapes differ, a target is no
            candidate, or a score is not finite.

    >>> student, teacher = torch.zeros(2, 1, 3), torch.zeros(4, 1, 3)
    >>> teacher[3, 0] = torch.tensor([2.0, 1.0, 0.0])
    >>> terms = lead_loss(student, teacher, torch.tensor([0]), [(1, 0), (3, 1)], layer_temperature=1.0)
    >>> [round(weight, 2) for weight in terms.weights.tolist()]
    [0.33, 0.67]
    """
    _check(student_scores, teacher_scores, target, pairs, mask)
    c = coefficients or TermWeights()
    if not co_train:
        teacher_scores = teacher_scores.detach()
        teacher_final = None if teacher_final is None else teacher_final.detach()
    student_last = student_scores[-1] if student_final is None else student_final
    teacher_last = teacher_scores[-1] if teacher_final is None else teacher_final
    of_teacher, of_student = (list(side) for side in zip(*pairs, strict=True))

    # Distributions over the candidates: t_a and s_b of the pairs, t_N and s_M of the final scores.
    t_layers = log_distribution(teacher_scores[of_teacher], mask, temperature)
    s_layers = log_distribution(student_scores[of_student], mask, temperature)
    t_final = log_distribution(teacher_last, mask, temperature)
    s_final = log_distribution(student_last, mask, temperature)

    stu = ranking_loss(log_distribution(student_last, mask), target)
    tch = ranking_loss(log_distribution(teacher_last, mask), target)

    rep = listwise_kl(t_final, s_final) * temperature**2
    if co_train:
        rep = rep + listwise_kl(s_final, t_final) * temperature**2

    layer_kl = listwise_kl(t_layers, s_layers) * temperature**2
    if reweight:
        ranking = log_distribution(teacher_scores[of_teacher].detach(), mask)
        weights = layer_weights(ranking, target, layer_temperature)
    else:
        weights = torch.full_like(layer_kl, 1 / len(pairs), requires_grad=False)
    lyr = (weights * layer_kl).sum()

    total = c.stu * stu + c.rep * rep + c.lyr * lyr
    if co_train:
        total = total + c.tch * tch
    return LeadTerms(
        total, stu.detach(), tch.detach(), rep.detach(), lyr.detach(), weights, layer_kl.detach(),
        peaked_share(t_layers),
    )  # fmt: skip


def peaked_share(log_probabilities: Float[Tensor, "*layers queries passages"]) -> float:
    """Share of distributions in which all but one candidate have less than `PEAKED` together."""
    with torch.no_grad():
        rest = -torch.expm1(log_probabilities.amax(-1).clamp(max=0))
        return float((rest < PEAKED).float().mean())


def _check(
    student: Tensor, teacher: Tensor, target: Tensor, pairs: Pairs, mask: Bool[Tensor, "..."] | None
) -> None:
    if student.shape[1:] != teacher.shape[1:]:
        raise InputError(
            f"expected as many queries and candidates as the student's {tuple(student.shape[1:])}",
            field="teacher_scores",
            value=tuple(teacher.shape[1:]),
        )
    if not pairs:
        raise InputError("expected at least one pair of layers", field="pairs", value=list(pairs))
    for name, layers, side in (("teacher", len(teacher), 0), ("student", len(student), 1)):
        wrong = [pair for pair in pairs if not 0 <= pair[side] < layers]
        if wrong:
            raise InputError(
                f"the {name} has the layers 0 to {layers - 1}", field="pairs", value=tuple(wrong[0])
            )
    for name, scores in (("student_scores", student), ("teacher_scores", teacher)):
        if not torch.isfinite(scores).all():
            raise InputError(
                "expected finite scores; a layer overflowed or the model's weights are no numbers",
                field=name,
                value=int((~torch.isfinite(scores)).sum()),
            )
    if mask is not None and not mask.gather(1, target[:, None]).all():
        raise InputError("expected each query's positive to be a candidate", field="mask")
