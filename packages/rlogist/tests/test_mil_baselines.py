from __future__ import annotations

import pytest
import torch
from feature_worlds import DIM, bags, modules

from rlogist.batched import make_store
from rlogist.mil_baselines import MIL_POOLINGS, PooledClassifier, fit_pooled


@pytest.mark.parametrize("pooling", MIL_POOLINGS)
def test_order_and_padding_of_regions_change_nothing(pooling):
    g = torch.Generator().manual_seed(0)
    rows, valid = torch.randn(3, 7, DIM, generator=g), torch.ones(3, 7, dtype=torch.bool)
    model = PooledClassifier(DIM, 2, pooling)
    found = model(rows, valid)
    order = torch.randperm(7, generator=g)
    torch.testing.assert_close(model(rows[:, order], valid), found)
    padded = torch.cat([rows, 100 * torch.ones(3, 2, DIM)], dim=1)
    more = torch.cat([valid, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model(padded, more), found)


def test_dsmil_by_hand():
    model = PooledClassifier(DIM, 3, "dsmil", width=5)
    rows = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(1))
    h = torch.relu(model.embed(rows[0]))
    single, query = model.instance(h), model.query(h)
    for c in range(3):
        m = int(single[:, c].argmax())
        a = torch.softmax(query @ query[m] / 5**0.5, 0)
        bag = model.head.weight[c] @ (a @ h) + model.head.bias[c]
        found = model(rows, torch.ones(1, 4, dtype=torch.bool))[0, c]
        torch.testing.assert_close(found, (single[m, c] + bag) / 2)


@pytest.mark.parametrize("pooling", MIL_POOLINGS)
def test_they_learn_from_all_regions_to_tell_new_slides_apart(pooling):
    own = modules(pooling="mean")
    train, held, test = (make_store(bags(n, seed=s), own) for n, s in ((24, 1), (8, 2), (20, 3)))
    model = fit_pooled(pooling, train, held, classes=2, seed=0, epochs=40, lr=5e-3)
    right = model(test.seen, test.valid).argmax(-1) == test.label
    assert right.float().mean() >= 0.9
