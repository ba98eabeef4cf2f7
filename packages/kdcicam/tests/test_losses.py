"""Losses against numbers computed another way."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from kdcicam.losses import (
    ClassifierLoss,
    Teachers,
    TwoTeacherLoss,
    area,
    distillation,
    foreground,
    map_distance,
)
from shared_core import InputError

Z_STUDENT, Z_TEACHER = [1.0, -2.0, 0.5], [3.0, 0.0, -1.0]


def probabilities(z: list[float], t: float) -> list[float]:
    e = [math.exp(x / t) for x in z]
    return [x / sum(e) for x in e]


@pytest.mark.parametrize("t", [1.0, 2.0, 15.0])
def test_both_readings_of_kl_at_three_temperatures(t):
    """Trap 7: the order of the arguments, the logarithm, and T^2."""
    student, teacher = torch.tensor([Z_STUDENT]), torch.tensor([Z_TEACHER])
    p, q = probabilities(Z_TEACHER, t), probabilities(Z_STUDENT, t)
    standard = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    released = sum(a * (math.log(a) - b) for a, b in zip(p, q, strict=True))
    assert distillation(student, teacher, t).item() == pytest.approx(standard, abs=1e-6)
    assert distillation(student, teacher, t, "released").item() == pytest.approx(released, abs=1e-6)
    assert distillation(student, teacher, t, t_squared=True).item() == pytest.approx(
        t * t * standard, abs=1e-4
    )
    assert distillation(teacher, student, t).item() != pytest.approx(standard, rel=1e-3)


def test_the_released_reading_hardly_pulls():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 200, generator=generator).requires_grad_()
    teacher = 3 * torch.randn(8, 200, generator=generator)
    norms = [
        torch.autograd.grad(distillation(z, teacher, 15.0, kl), z)[0].norm()
        for kl in ("standard", "released")
    ]
    assert 100 < norms[0] / norms[1] < 1000


def test_maps_are_compared_over_all_classes_and_cells():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    total = sum((1 / (1 + math.exp(-x / 5)) - 1 / (1 + math.exp(-y / 5))) ** 2
                for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))  # fmt: skip
    assert map_distance(a, b, 5.0).item() == pytest.approx(total / 96, rel=1e-4)


def setting():
    student, cls, loc = (tiny.with_pool(tiny.model(seed=seed), seed) for seed in (0, 1, 2))
    return student, Teachers(cls, loc, student), tiny.images(), torch.tensor([0, 1, 2, 3, 4, 0])


def test_the_students_loss_is_the_formula():
    student, teachers, x, labels = setting()
    flags = torch.tensor([0, 1, 2, 1, 2, 2])
    out = student(x)
    terms = TwoTeacherLoss(0.7, 4.0, 3.0, 2.5)(out, labels, flags, *teachers(x, flags))
    ce = -out.logits.log_softmax(1)[range(6), labels].mean()
    p = [(teachers.cls(x[[i]]).logits / 4).softmax(1) for i in (1, 3)]
    q = [(out.logits[[i]] / 4).softmax(1) for i in (1, 3)]
    l_cls = sum((a * (a / b).log()).sum() for a, b in zip(p, q, strict=True)) / 2
    i2 = [2, 4, 5]
    l_loc = ((out.cam[i2] / 3).sigmoid() - (teachers.loc(x[i2]).cam / 3).sigmoid()).square().mean()
    torch.testing.assert_close(terms["loss"], 0.3 * ce + 0.7 * l_cls + 0.7 * 2.5 * l_loc)


@pytest.mark.parametrize(
    ("flags", "terms"), [([0] * 6, {"ce"}), ([1] * 6, {"ce", "cls"}), ([0, 2, 2, 0, 0, 0], {"ce", "loc"})]
)
def test_a_teacher_without_images_drops_its_term(flags, terms):
    student, teachers, x, labels = setting()
    flags = torch.tensor(flags)
    given = TwoTeacherLoss()(student(x), labels, flags, *teachers(x, flags))
    assert given.keys() == {"loss"} | terms
    assert given["loss"].isfinite()
    given["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_each_teacher_sees_its_own_images_only():
    """Trap 8: forwards are counted by flag."""
    _, teachers, x, _ = setting()
    seen = {"cls": [], "loc": []}
    for name in seen:
        getattr(teachers, name).register_forward_hook(
            lambda module, given, out, name=name: seen[name].append(given[0])
        )
    flags = torch.tensor([2, 1, 0, 1, 0, 2])
    teachers(x, flags)
    assert [len(calls) for calls in seen.values()] == [1, 1]
    assert torch.equal(seen["cls"][0], x[[1, 3]])
    assert torch.equal(seen["loc"][0], x[[0, 5]])
    teachers(x, torch.zeros(6, dtype=torch.long))
    assert [len(calls) for calls in seen.values()] == [1, 1]


def test_teachers_do_not_learn():
    """Trap 5."""
    student, teachers, x, labels = setting()
    before = {name: value.clone() for name, value in teachers.state_dict().items()}
    optimizer = torch.optim.Adam([*student.parameters(), *teachers.parameters()], lr=0.1)
    teachers.train()
    flags = torch.tensor([1, 2, 1, 2, 0, 0])
    TwoTeacherLoss()(student(x), labels, flags, *teachers(x, flags))["loss"].backward()
    optimizer.step()
    assert not any(module.training for module in teachers.modules())
    assert not any(parameter.requires_grad for parameter in teachers.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teachers.state_dict().items())


def test_the_up_branch_has_no_loss_of_its_own_in_the_student():
    student, _, x, labels = setting()
    out = student(x)
    loss = TwoTeacherLoss(alpha=0.0)(out, labels, torch.zeros(6, dtype=torch.long))["loss"]
    assert torch.autograd.grad(loss, out.logits_raw, allow_unused=True) == (None,)


def test_teachers_of_other_classes_or_maps_are_refused():
    student = tiny.model()
    with pytest.raises(
        InputError, match=r"cls teacher: a teacher needs the student's num_classes 5 \(got 6\)"
    ):
        Teachers(tiny.model(6), None, student)
    with pytest.raises(InputError, match=r"loc teacher: .* map_size \(6, 6\) \(got \(8, 8\)\)"):
        Teachers(None, tiny.model(size=32), student)
    flags = torch.ones(6, dtype=torch.long)
    x, labels = tiny.images(), torch.zeros(6, dtype=torch.long)
    with pytest.raises(InputError, match="cls_out: does not fit the student's"):
        TwoTeacherLoss()(student(x), labels, flags, cls_out=student(x[:2]))
    with pytest.raises(InputError, match="flags: expected 0, 1 or 2"):
        TwoTeacherLoss()(student(x), labels, 3 * flags)
    with pytest.raises(InputError, match="labels: expected 0 to 4"):
        TwoTeacherLoss()(student(x), labels + 5, flags)


def test_a_teachers_loss_is_the_formula():
    model, x, labels = tiny.with_pool(tiny.model()), tiny.images(), torch.tensor([0, 1, 2, 3, 4, 0])
    out = model(x)
    mask = foreground(out, (24, 24), 0.3, "quadratic", 5)[:, None]
    share = mask.float().mean()
    assert 0.05 < share < 0.95
    u_f, u_b = (model.classifier(model.backbone(x * part).mean((2, 3))) for part in (mask, ~mask))
    ce = F.cross_entropy
    plain = ce(out.logits, labels) + ce(out.logits_raw, labels)
    maps = out.combined("quadratic", 5)
    low = maps.amin((1, 2), keepdim=True)
    wide = F.interpolate((maps - low)[:, None], (24, 24), mode="bilinear").mean()

    def loss(**options):
        return ClassifierLoss(threshold=0.3, **options)(model, out, x, labels)["loss"]

    torch.testing.assert_close(loss(), plain)
    torch.testing.assert_close(loss(auxiliary="fore", eta=0.6), plain + 0.6 * ce(u_f, labels))
    difference = u_f - u_b
    expected = ce(difference, labels) + ce((difference + out.logits) / 2, labels)
    torch.testing.assert_close(loss(auxiliary="diff_aux", eta=0.5), plain + 0.5 * expected)
    torch.testing.assert_close(loss(area=0.04, area_mode=2), plain + 0.04 * wide)
    torch.testing.assert_close(loss(area=0.04, area_mode=1), plain + 0.04 * (maps - low).mean())
    torch.testing.assert_close(loss(both=False), ce(out.logits, labels))


def test_the_area_term_pushes_the_map_down():
    model, x = tiny.with_pool(tiny.model()), tiny.images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    before = area(model(x), (24, 24), 2, "quadratic", 5)
    for _ in range(5):
        optimizer.zero_grad()
        area(model(x), (24, 24), 2, "quadratic", 5).backward()
        optimizer.step()
    assert area(model(x), (24, 24), 2, "quadratic", 5) < before


def test_settings_out_of_range():
    for options, words in (
        ({"alpha": 1.2}, "alpha: expected 0 to 1"),
        ({"T_cls": 0.0}, "T_cls: expected a number above 0"),
        ({"T_loc": -1.0}, "T_loc: expected a number above 0"),
    ):
        with pytest.raises(InputError, match=words):
            TwoTeacherLoss(**options)
    with pytest.raises(InputError, match="threshold: expected 0 to below 1"):
        ClassifierLoss(threshold=1.0)


def test_one_teacher_with_t_squared_is_hintons_distillation():
    """The plain baseline: flag 1 for every image, T squared."""
    student, teacher = tiny.model(5)(tiny.images()), tiny.model(5, seed=3)(tiny.images())
    labels, t, alpha = torch.arange(6) % 5, 4.0, 0.7
    ours = TwoTeacherLoss(alpha, T_cls=t, t_squared=True)(student, labels, torch.ones(6).long(), teacher)
    p = torch.softmax(teacher.logits / t, 1)
    kl = (p * (p.log() - torch.log_softmax(student.logits / t, 1))).sum(1).mean()
    hard = -torch.log_softmax(student.logits, 1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(ours["loss"], (1 - alpha) * hard + alpha * t**2 * kl)
