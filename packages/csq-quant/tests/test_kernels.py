"""The compiled kernels give what the plain ones give, and no run fails because a compiler does."""

from __future__ import annotations

import pytest
import torch
from hosted_models import unchecked
from torch import nn

import csq
from csq import kernels
from csq.functional import bit_weight
from shared_core import InputError


def leaves(n: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    drawn = [torch.randn(n, *shape, generator=generator) for _ in range(2)]
    return [t.requires_grad_() for t in (*drawn, torch.randn(n, generator=generator), torch.tensor(0.7))]


# torch's inductor: its own deprecated calls and notes on the host, nothing that a user of csq can change.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.skipif(not kernels.has_compiler("cpu"), reason="needs a C++ compiler")
def test_compiled_kernels_agree_with_plain_ones_on_all_shapes():
    with torch._dynamo.config.patch(recompile_limit=1):  # variants beyond torch's limit are compiled too
        for n, shape in ((8, (300,)), (3, (7, 5, 3, 3)), (1, (1,))):
            plain, fused = leaves(n, shape), leaves(n, shape)
            expected = bit_weight(*plain, 3.0)
            found = bit_weight(*fused, 3.0, compiled=True)
            torch.testing.assert_close(found, expected)
            expected.square().sum().backward()
            found.square().sum().backward()
            for one, other in zip(plain, fused, strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert not kernels._failed  # it was the compiled kernel that was compared


def test_a_compiler_that_fails_costs_one_warning_and_no_result(monkeypatch):
    def broken(kernel):
        def run(*arguments):
            raise RuntimeError("no tool chain")

        return run

    monkeypatch.setattr(kernels, "_compile", broken)
    monkeypatch.setattr(kernels, "_failed", False)
    plain, fused = leaves(4, (20,)), leaves(4, (20,))
    with pytest.warns(UserWarning, match="compiled kernel is not available") as caught:
        bit_weight(*fused, 3.0, compiled=True).square().sum().backward()
    assert len(caught) == 1
    bit_weight(*plain, 3.0).square().sum().backward()
    assert torch.equal(plain[0].grad, fused[0].grad)


def test_auto_compiles_large_models_where_there_is_a_compiler(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("CSQ_KERNEL")
    monkeypatch.setattr(kernels, "has_compiler", lambda _: True)
    assert kernels.choose("auto", 2_000_000, cpu)
    assert not kernels.choose("auto", 1000, cpu)
    monkeypatch.setenv("CSQ_KERNEL", "eager")
    assert not kernels.choose("auto", 2_000_000, cpu)
    assert kernels.choose("compiled", 1000, cpu)
    monkeypatch.delenv("CSQ_KERNEL")
    monkeypatch.setattr(kernels, "has_compiler", lambda _: False)
    assert not kernels.choose("auto", 2_000_000, cpu)


def test_unknown_kernels_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"kernel: expected auto, eager, compiled \(got 'fast'\)"):
        unchecked(csq.parametrize)(nn.Linear(2, 2), kernel="fast")
    monkeypatch.setenv("CSQ_KERNEL", "fast")
    with pytest.raises(InputError, match="CSQ_KERNEL: expected auto"):
        csq.parametrize(nn.Linear(2, 2))
