"""The bit-level weight and its gradients, against autograd on the formula and against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import csq
from csq.functional import GradientBuffers, bit_weight, naive_bit_weight, plane_sum


def gates(n: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": dtype}
    positive, negative = torch.randn(n, *shape, **draw), torch.randn(n, *shape, **draw)
    mask, scale = torch.randn(n, **draw), torch.rand((), **draw) + 0.1
    return [tensor.requires_grad_() for tensor in (positive, negative, mask, scale)]


@given(
    n=st.integers(1, 8),
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple),
    temperature=st.floats(1, 200),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_those_of_the_plain_formula(n, shape, temperature, seed):
    ours, plain = gates(n, shape, seed), gates(n, shape, seed)
    weight, expected = bit_weight(*ours, temperature), naive_bit_weight(*plain, temperature)
    torch.testing.assert_close(weight, expected)
    upstream = torch.randn(shape, dtype=torch.float64)
    weight.backward(upstream)
    expected.backward(upstream)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_gradients_pass_finite_differences():
    assert torch.autograd.gradcheck(lambda *g: bit_weight(*g, 1.7), gates(4, (3, 2)))


def test_gradients_are_the_closed_forms_and_not_straight_through():
    positive, negative, mask, scale = gates(3, (5,))
    beta, n = 2.5, 3
    upstream = torch.linspace(-1, 1, 5, dtype=torch.float64)
    weight = bit_weight(positive, negative, mask, scale, beta)
    weight.backward(upstream)
    p, q, g = (torch.sigmoid(beta * t.detach()) for t in (positive, negative, mask))
    for b in range(n):
        c = 2**b / (2**n - 1)
        s = scale.detach()
        torch.testing.assert_close(positive.grad[b], s * c * g[b] * beta * p[b] * (1 - p[b]) * upstream)
        torch.testing.assert_close(negative.grad[b], -s * c * g[b] * beta * q[b] * (1 - q[b]) * upstream)
        by_mask = s * c * beta * g[b] * (1 - g[b]) * ((p[b] - q[b]) * upstream).sum()
        torch.testing.assert_close(mask.grad[b], by_mask)
        assert not torch.allclose(positive.grad[b], upstream)
    torch.testing.assert_close(scale.grad, (upstream * weight.detach()).sum() / scale.detach())


def test_second_derivatives_are_refused_with_advice():
    arguments = gates(2, (3,))
    weight = bit_weight(*arguments, 1.0)
    with pytest.raises(RuntimeError, match=r"differentiable once.*naive_bit_weight"):
        torch.autograd.grad(weight.sum(), arguments[0], create_graph=True)


def test_planes_left_out_equal_planes_with_gate_zero():
    positive, negative, _, scale = gates(4, (6,))
    half = torch.tensor([0.5, 0.0, 0.25, 0.0], dtype=torch.float64)
    some = plane_sum(positive, negative, half, scale, 3.0, live=[0, 2])
    torch.testing.assert_close(some, plane_sum(positive, negative, half, scale, 3.0))
    some.sum().backward()
    assert positive.grad[[1, 3]].eq(0).all()
    assert negative.grad[[1, 3]].eq(0).all()
    assert positive.grad[[0, 2]].ne(0).all()


def test_large_weights_are_added_plane_by_plane_with_the_same_result(monkeypatch):
    whole, pieces = gates(5, (40,)), gates(5, (40,))
    bit_weight(*whole, 2.0).square().sum().backward()
    monkeypatch.setattr("csq.functional.CHUNK", 80)  # two planes at a time
    bit_weight(*pieces, 2.0).square().sum().backward()
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_closed_gates_give_step_times_whole_number_to_the_last_bit():
    positive, negative, _, scale = gates(8, (100,), dtype=torch.float32)
    weight = plane_sum(positive.sign(), negative.sign(), torch.ones(8), scale, 200.0)
    place = 2 ** torch.arange(8).view(-1, 1)
    codes = ((positive > 0).int() * place - (negative > 0).int() * place).sum(0)
    assert torch.equal(weight, codes.float() * (scale / 255))


def test_nothing_of_the_size_of_planes_is_saved_but_the_arguments():
    arguments = gates(8, (50,))
    saved: list[int] = []
    own = {tensor.data_ptr() for tensor in arguments}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        bit_weight(*arguments, 2.0)
        ours = sum(saved)
        saved.clear()
        naive_bit_weight(*arguments, 2.0)
    assert ours < 50
    assert sum(saved) > 3 * 8 * 50  # what plain autograd keeps


class TestGradientBuffers:
    def backward(self, arguments, buffers):
        positive, negative, mask, scale = arguments
        weight = plane_sum(positive, negative, torch.sigmoid(mask), scale, 2.0, buffers=buffers)
        weight.square().sum().backward()

    def test_memory_is_reused_after_gradients_are_dropped(self):
        arguments, buffers = gates(4, (9,)), GradientBuffers()
        self.backward(arguments, buffers)
        places = {arguments[0].grad.data_ptr(), arguments[1].grad.data_ptr()}
        arguments[0].grad = arguments[1].grad = None
        self.backward(arguments, buffers)
        assert {arguments[0].grad.data_ptr(), arguments[1].grad.data_ptr()} == places

    def test_accumulated_gradients_are_sums(self):
        arguments, buffers = gates(4, (9,)), GradientBuffers()
        self.backward(arguments, buffers)
        once = arguments[0].grad.clone()
        self.backward(arguments, buffers)
        torch.testing.assert_close(arguments[0].grad, 2 * once)

    def test_a_gradient_that_someone_keeps_is_not_written_over(self):
        arguments, buffers = gates(4, (9,)), GradientBuffers()
        self.backward(arguments, buffers)
        kept = arguments[0].grad.view(-1)[3:]
        before = kept.clone()
        arguments[0].grad = None
        with torch.no_grad():
            arguments[0].add_(1)
        self.backward(arguments, buffers)
        assert torch.equal(kept, before)

    def test_a_weight_used_twice_in_one_graph_gets_the_sum(self):
        arguments, buffers = gates(4, (9,)), GradientBuffers()
        positive, negative, mask, scale = arguments

        def weight():
            return plane_sum(positive, negative, torch.sigmoid(mask), scale, 2.0, buffers=buffers)

        (weight().square().sum() + weight().sum()).backward()
        found = positive.grad.clone()
        once = gates(4, (9,))
        soft = plane_sum(once[0], once[1], torch.sigmoid(once[2]), once[3], 2.0)
        (soft.square().sum() + soft.sum()).backward()
        torch.testing.assert_close(found, once[0].grad)


def test_gates_that_are_not_contiguous_have_the_same_gradients():
    generator = torch.Generator().manual_seed(3)
    gates = [torch.randn(3, 8, 4, generator=generator).transpose(1, 2) for _ in range(2)]
    mask, scale = torch.randn(3, generator=generator), torch.tensor(0.7)
    found = []
    for function in (bit_weight, naive_bit_weight):
        leaves = [value.detach().requires_grad_() for value in (*gates, mask, scale)]
        assert not leaves[0].is_contiguous()
        function(*leaves, torch.tensor(2.0)).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_parametrized_convolution_may_be_moved_to_channels_last():
    model = csq.parametrize(torch.nn.Conv2d(2, 3, 3))
    before = model.weight.detach().clone()
    model.to(memory_format=torch.channels_last)
    assert torch.equal(model.weight, before)
    model(torch.randn(1, 2, 5, 5)).sum().backward()
    planes = next(iter(csq.bit_layers(model).values()))
    assert planes.positive.is_contiguous()
    assert torch.isfinite(planes.positive.grad).all()
