from __future__ import annotations

import pytest
import torch
from feature_worlds import DIM, modules
from hypothesis import given
from hypothesis import strategies as st

from rlogist.modules import Architecture, Critic, LocalPooling, Policy, masked, normalized
from shared_core import InputError

N = 7
NETWORKS = Policy(DIM), Critic(DIM), modules()


def batch(seed: int, regions: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, regions, DIM, generator=g)
    return rows, torch.rand(2, regions, generator=g) < 0.4, torch.ones(2, regions, dtype=torch.bool)


@given(st.integers(0, 1000), st.permutations(range(N)))
def test_permuting_regions_permutes_the_policy_and_leaves_critic_and_class(seed, order):
    rows, observed, valid = batch(seed)
    policy, critic, own = NETWORKS
    torch.testing.assert_close(policy(rows[:, order], observed[:, order]), policy(rows, observed)[:, order])
    torch.testing.assert_close(
        critic(rows[:, order], observed[:, order], valid), critic(rows, observed, valid)
    )
    torch.testing.assert_close(own.classifier(rows[:, order], valid), own.classifier(rows, valid))


@pytest.mark.parametrize("attention", ["softmax", "sigmoid_norm"])
def test_padding_changes_nothing(attention):
    rows, observed, valid = batch(0)
    padded = torch.cat([rows, 100 * torch.ones(2, 3, DIM)], dim=1)
    more = torch.cat([valid, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    flags = torch.cat([observed, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    own, critic = modules(attention=attention), Critic(DIM)
    torch.testing.assert_close(own.classifier(padded, more), own.classifier(rows, valid))
    torch.testing.assert_close(critic(padded, flags, more), critic(rows, observed, valid))
    assert (own.classifier.explain(padded, more)[1][:, N:] == 0).all()


def test_attention_forms_are_their_formulas():
    scores, valid = torch.tensor([[0.0, 1.0, -2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    sigmoid = [1 / (1 + 2.718281828459045**-x) for x in (0.0, 1.0, -2.0)]
    expected = torch.tensor([[x / sum(sigmoid) for x in sigmoid] + [0.0]])
    torch.testing.assert_close(normalized(scores, valid, "sigmoid_norm"), expected)
    torch.testing.assert_close(normalized(scores, valid, "softmax")[0, :3], torch.softmax(scores[0, :3], 0))


def test_logits_are_the_attention_weighted_mean_of_single_regions_logits():
    rows, _, valid = batch(3)
    classifier = modules().classifier
    logits, attention = classifier.explain(rows, valid)
    mean = (attention.unsqueeze(-1) * classifier.instances(rows)).sum(1)
    torch.testing.assert_close(logits, mean)


def test_f_global_is_the_mlp_on_the_concatenation_and_starts_as_no_change():
    rows, _, _ = batch(1)
    before, after = torch.randn(2, DIM), torch.randn(2, DIM)
    assert torch.equal(modules(moving=False).f_global(rows, before, after), rows)
    f = modules().f_global
    for slide in range(2):
        for region in range(N):
            joined = torch.cat([rows[slide, region], before[slide], after[slide]])
            expected = rows[slide, region] + f.change(torch.nn.functional.gelu(f.hidden(joined)))
            torch.testing.assert_close(f(rows, before, after)[slide, region], expected)


def test_f_local_is_a_convex_mean_that_ignores_the_order_of_patches():
    deep = torch.randn(3, 5, DIM)
    for pooling in (LocalPooling(DIM, 8), LocalPooling(DIM, pooling="mean")):
        found = pooling(deep)
        torch.testing.assert_close(pooling(deep[:, [4, 2, 0, 1, 3]]), found)
        torch.testing.assert_close(pooling(deep + 1), found + 1) if pooling.scores is None else None
        assert (found <= deep.amax(1) + 1e-6).all()
        assert (found >= deep.amin(1) - 1e-6).all()


def test_masked_actions_have_no_probability_at_all():
    allowed = torch.tensor([[True, False, True]])
    p = torch.softmax(masked(torch.tensor([[0.0, 50.0, 0.0]]), allowed), -1)
    assert p.tolist() == [[0.5, 0.0, 0.5]]


def test_sizes_that_make_no_network_are_told():
    with pytest.raises(InputError, match="expected dim >= 1 and classes >= 2, got 3 and 1"):
        Architecture(3, classes=1)
