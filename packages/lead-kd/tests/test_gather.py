"""Two processes with half of a step each have the gradients of one process with all of it."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from gathering import inputs, loss_of, work

from lead_kd.scores import gather_padded, gather_plain, gather_with_gradient


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradients_reach_the_process_that_has_the_passage(results):
    q, p = inputs()
    p.requires_grad_()
    loss_of(q, p, torch.arange(0, 8, 2)).backward()
    # DistributedDataParallel averages over processes: the mean of both losses is that of all queries.
    together = torch.cat([found["grad"] for found in results], 1) / 2
    torch.testing.assert_close(together, p.grad)


def test_ids_and_tokens_of_different_lengths_are_joined(results):
    for found in results:
        assert found["ids"].tolist() == [0, 10, 1, 11]
        assert found["padded"].squeeze(-1).tolist() == [[1, 1, 0], [1, 1, 0], [2, 2, 2], [2, 2, 2]]


def test_one_process_keeps_its_tensor():
    tensor = torch.ones(2, 3)
    for gather in (gather_with_gradient, gather_plain, gather_padded):
        assert gather(tensor) is tensor
