"""A model of bit planes under torch.compile; a module that a process of its own can import."""

from __future__ import annotations

import torch
from torch import nn

import csq


def check_traced() -> None:
    """Outputs and gradients are those of the plain model, out of one graph without a break."""
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    csq.parametrize(model, n_bits=2, kernel="eager").eval()
    x = torch.randn(4, 3, 8, 8)
    whole = torch.compile(model, backend="aot_eager")  # traces as inductor does, without a compiler's seconds
    torch.testing.assert_close(whole(x), model(x))
    whole(x).sum().backward()
    traced = csq.bit_layers(model)["0"].positive.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(traced, csq.bit_layers(model)["0"].positive.grad)
    assert list(csq.bit_layers(whole)) == ["0", "3"]
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 1
