from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from lead_kd.losses import (
    TermWeights,
    layer_weights,
    lead_loss,
    listwise_kl,
    log_distribution,
    peaked_share,
    ranking_loss,
)
from shared_core import InputError


def random_scores(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(student, teacher, target, pairs, layer_temperature, temperature=1.0, mask=None, co_train=False):
    """The equations with scipy, one query and layer at a time."""
    queries, passages = student.shape[1:]
    allowed = np.ones((queries, passages), bool) if mask is None else mask.numpy()
    student, teacher = student.numpy(), teacher.numpy()

    def kl(t, s):
        total = 0.0
        for q in range(queries):
            keep = allowed[q]
            p, r = softmax(t[q, keep] / temperature), softmax(s[q, keep] / temperature)
            total += rel_entr(p, r).sum()
        return temperature**2 * total / queries

    def ce(scores):
        total = 0.0
        for q in range(queries):
            columns = np.flatnonzero(allowed[q])
            place = int(np.flatnonzero(columns == int(target[q]))[0])
            total -= log_softmax(scores[q, columns])[place]
        return total / queries

    weights = softmax([-ce(teacher[a]) / layer_temperature for a, _ in pairs])
    lyr = sum(w * kl(teacher[a], student[b]) for w, (a, b) in zip(weights, pairs, strict=True))
    rep = kl(teacher[-1], student[-1])
    total = ce(student[-1]) + rep + lyr
    if co_train:
        total += ce(teacher[-1]) + kl(student[-1], teacher[-1])
    return total, weights


@given(
    st.integers(1, 4), st.integers(2, 7), st.integers(1, 3), st.floats(0.3, 10), st.floats(0.5, 3),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_loss_is_the_papers_equations(
    queries, passages, k, layer_temperature, temperature, co_train, seed
):
    student, teacher = (
        random_scores(3, queries, passages, seed=seed), random_scores(5, queries, passages, seed=seed + 100)
    )  # fmt: skip
    random = np.random.default_rng(seed)
    target = torch.from_numpy(random.integers(passages, size=queries))
    mask = torch.from_numpy(random.random((queries, passages)) < 0.7).scatter(1, target[:, None], True)
    drawn = (sorted(random.permutation(layers)[:k].tolist()) for layers in (5, 3))
    pairs = list(zip(*drawn, strict=True))
    terms = lead_loss(
        student, teacher, target, pairs, layer_temperature=layer_temperature, temperature=temperature,
        mask=mask, co_train=co_train,
    )  # fmt: skip
    total, weights = reference(
        student, teacher, target, pairs, layer_temperature, temperature, mask, co_train
    )
    assert terms.total.item() == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(terms.weights.numpy(), weights, rtol=1e-9)


def test_the_kl_is_from_teacher_to_student_summed_over_candidates():
    t, s = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert listwise_kl(t.log(), s.log()).item() == pytest.approx(by_hand)
    two = listwise_kl(t.log().repeat(2, 1), s.log().repeat(2, 1))  # a mean over queries, not over candidates
    assert two.item() == pytest.approx(by_hand)


def test_the_layer_that_ranks_best_weighs_most_and_weights_sum_to_one():
    good, bad = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    logs = log_distribution(torch.stack([bad, good]))
    weights = layer_weights(logs, torch.tensor([0]), 1.0)
    assert weights[1] > weights[0]
    assert weights.sum().item() == pytest.approx(1)
    softer = layer_weights(logs, torch.tensor([0]), 10.0)
    assert softer[0] > weights[0]
    ce = ranking_loss(logs, torch.tensor([0]))
    assert (weights[1] / weights[0]).item() == pytest.approx(math.exp((ce[0] - ce[1]).item()), rel=1e-5)


def test_weights_have_no_gradient():
    """With weights held constant by hand, gradients are the same."""
    student = random_scores(2, 3, 6).requires_grad_()
    teacher = random_scores(4, 3, 6, seed=1).requires_grad_()
    target, pairs = torch.tensor([0, 2, 4]), [(0, 0), (2, 1)]
    terms = lead_loss(student, teacher, target, pairs, co_train=True, layer_temperature=1.0)
    terms.total.backward()
    assert not terms.weights.requires_grad
    own_student, own_teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    s, t = own_student.log_softmax(-1), own_teacher.log_softmax(-1)
    kl = [listwise_kl(t[a], s[b]) for a, b in pairs]
    total = (
        ranking_loss(s[-1], target) + ranking_loss(t[-1], target)
        + listwise_kl(t[-1], s[-1]) + listwise_kl(s[-1], t[-1])
        + sum(float(w) * part for w, part in zip(terms.weights, kl, strict=True))
    )  # fmt: skip
    total.backward()
    torch.testing.assert_close(student.grad, own_student.grad)
    torch.testing.assert_close(teacher.grad, own_teacher.grad)


def test_a_frozen_teacher_has_no_gradient_and_a_trained_one_has():
    for co_train in (False, True):
        student, teacher = (
            random_scores(2, 2, 4).requires_grad_(),
            random_scores(2, 2, 4, seed=1).requires_grad_(),
        )
        lead_loss(student, teacher, torch.tensor([0, 2]), [(0, 0)], co_train=co_train).total.backward()
        assert (teacher.grad is not None) == co_train
        assert student.grad is not None


def test_gradients_are_those_of_finite_differences():
    student = random_scores(2, 2, 4, scale=1.0).requires_grad_()
    target, pairs, teacher = torch.tensor([1, 3]), [(0, 0), (1, 1)], random_scores(3, 2, 4, seed=5)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = False
    assert torch.autograd.gradcheck(
        lambda s: lead_loss(s, teacher, target, pairs, temperature=2.0, mask=mask).total, student
    )


def test_without_reweighting_each_layer_weighs_the_same_and_the_size_stays():
    student, teacher = random_scores(3, 2, 5), random_scores(3, 2, 5, seed=1)
    terms = lead_loss(student, teacher, torch.tensor([0, 1]), [(0, 0), (2, 2)], reweight=False)
    assert terms.weights.tolist() == [0.5, 0.5]
    assert terms.lyr.item() == pytest.approx(terms.layer_kl.mean().item())


def test_coefficients_take_terms_out():
    student, teacher = random_scores(2, 2, 5), random_scores(2, 2, 5, seed=1)
    only = lead_loss(
        student, teacher, torch.tensor([0, 1]), [(0, 0)], coefficients=TermWeights(stu=0, rep=0, lyr=2)
    )
    assert only.total.item() == pytest.approx(2 * only.lyr.item())


def test_final_scores_may_differ_from_the_last_layers():
    student, teacher = random_scores(2, 2, 5), random_scores(2, 2, 5, seed=1)
    final = random_scores(2, 5, seed=2)
    terms = lead_loss(student, teacher, torch.tensor([0, 1]), [(0, 0)], student_final=final)
    assert terms.stu.item() == pytest.approx(ranking_loss(final.log_softmax(-1), torch.tensor([0, 1])).item())


def test_a_masked_candidate_changes_nothing():
    student, teacher = random_scores(2, 2, 5), random_scores(2, 2, 5, seed=1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3] = False
    other = teacher.clone()
    other[:, :, 3] = 50.0
    values = [
        lead_loss(student, t, torch.tensor([0, 1]), [(0, 0)], mask=mask).total.item()
        for t in (teacher, other)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_mask_is_finite_and_near(dtype):
    student, teacher = random_scores(2, 3, 6).to(dtype), random_scores(2, 3, 6, seed=1).to(dtype)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 5] = False
    target = torch.tensor([0, 1, 2])
    half = lead_loss(student, teacher, target, [(1, 1)], mask=mask)
    full = lead_loss(student.double(), teacher.double(), target, [(1, 1)], mask=mask)
    assert half.total.dtype == torch.float32
    assert half.total.item() == pytest.approx(full.total.item(), rel=1e-5)


def test_a_peaked_teacher_is_told():
    flat, peaked = torch.zeros(2, 4), torch.tensor([[200.0, 0, 0, 0], [0.0, 0, 0, 0]])
    assert peaked_share(flat.log_softmax(-1)) == 0
    assert peaked_share(peaked.log_softmax(-1)) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [(4, 0)]}, r"pairs: the teacher has the layers 0 to 3 \(got \(4, 0\)\)"),
        ({"pairs": [(0, 2)]}, "pairs: the student has the layers 0 to 1"),
        ({"pairs": []}, "pairs: expected at least one pair"),
        (
            {"teacher_scores": torch.zeros(4, 2, 4)},
            r"expected as many queries and candidates as the student's",
        ),
        ({"teacher_scores": torch.full((4, 2, 5), torch.nan)}, "teacher_scores: expected finite scores"),
        ({"student_scores": torch.full((2, 2, 5), torch.inf)}, "student_scores: expected finite scores"),
        (
            {"mask": torch.zeros(2, 5, dtype=torch.bool)},
            "mask: expected each query's positive to be a candidate",
        ),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    arguments = {
        "student_scores": torch.zeros(2, 2, 5), "teacher_scores": torch.zeros(4, 2, 5),
        "target": torch.tensor([0, 1]), "pairs": [(0, 0)],
    } | change  # fmt: skip
    with pytest.raises(InputError, match=message):
        lead_loss(**arguments)
