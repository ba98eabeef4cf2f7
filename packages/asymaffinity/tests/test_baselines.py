"""The peers' losses, against plain loops and what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from asymaffinity.baselines import level_set_loss, mil_loss
from asymaffinity.grid import cell_masks

CELLS = torch.tensor([[1, 2, 5, 6], [0, 0, 7, 3], [2, 2, 3, 3]])


def test_bags_of_rows_and_columns_are_those_of_a_loop():
    x = 2 * torch.randn(3, 6, 7, dtype=torch.float64)
    total = 0.0
    for logits, (x0, y0, x1, y1) in zip(x, CELLS.tolist(), strict=True):
        p = torch.sigmoid(logits)
        lines = [(p[r], range(x0, x1), y0 <= r < y1) for r in range(6)]
        lines += [(p[:, c], range(y0, y1), x0 <= c < x1) for c in range(7)]
        inside = [-math.log(max(line[k].item() for k in own)) for line, own, crosses in lines if crosses]
        beside = [-math.log(1 - line.max().item()) for line, _, crosses in lines if not crosses]
        total += sum(inside) / len(inside) + sum(beside) / max(1, len(beside))
    assert mil_loss(x, CELLS).item() == pytest.approx(total / 3)
    assert gradcheck(lambda logits: mil_loss(logits, CELLS), x.requires_grad_())
    assert mil_loss(x[:0], CELLS[:0]) == 0


def test_a_tight_mask_costs_nothing_and_an_empty_or_leaking_one_does():
    inside = cell_masks(CELLS, (6, 7))
    tight = torch.where(inside, 30.0, -30.0)
    assert mil_loss(tight, CELLS) < 1e-6
    assert mil_loss(-30 * torch.ones(3, 6, 7), CELLS) > 20
    assert mil_loss(30 * torch.ones(3, 6, 7), CELLS) > 10


def test_the_level_set_energy_is_that_of_a_loop():
    logits, features = torch.randn(3, 6, 7), torch.randn(2, 3, 6, 7)
    index = torch.tensor([0, 1, 1])
    total = 0.0
    for n, (x0, y0, x1, y1) in enumerate(CELLS[:2].tolist()):
        p = torch.sigmoid(logits[n])[y0:y1, x0:x1]
        f = features[index[n]][:, y0:y1, x0:x1]
        c1, c2 = ((f * w).sum((1, 2)) / w.sum() for w in (p, 1 - p))
        mean = f.mean((1, 2))
        away = [(f - c[:, None, None]).square().sum(0) for c in (c1, c2, mean)]
        energy = (away[0] * p + away[1] * (1 - p)).sum() / away[2].sum()
        outline = p.diff(dim=0).abs().sum() + p.diff(dim=1).abs().sum()
        total += (energy + 0.3 * outline / p.numel()).item()
    found = level_set_loss(logits[:2], features, CELLS[:2], index[:2], gamma=0.3)
    assert found.item() == pytest.approx(total / 2, rel=1e-4)


def test_level_sets_part_two_colours_in_any_unit_and_one_colour_not():
    features = torch.zeros(1, 3, 6, 7)
    features[:, :, :, 3:] = 5
    halves = torch.zeros(1, 6, 7)
    halves[:, :, :3], halves[:, :, 3:] = 30, -30
    cells, index = torch.tensor([[0, 0, 7, 6]]), torch.tensor([0])
    parted = level_set_loss(halves, features, cells, index, gamma=0)
    assert parted < 1e-4
    whole = level_set_loss(torch.full((1, 6, 7), 30.0), features, cells, index, gamma=0)
    assert whole.item() == pytest.approx(1, abs=1e-3)
    mixed = torch.randn(1, 6, 7)
    one, thousand = (level_set_loss(mixed, s * features, cells, index) for s in (1, 1000))
    assert one.item() == pytest.approx(thousand.item(), rel=1e-4)
    flat = level_set_loss(mixed.requires_grad_(), torch.zeros(1, 3, 6, 7), cells, index)
    flat.backward()
    assert flat.isfinite()
    assert mixed.grad.isfinite().all()
    assert level_set_loss(mixed[:0], features, cells[:0], index[:0]) == 0
