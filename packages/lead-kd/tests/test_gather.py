"""Two processes with half of a step each have the gradients of one process with all of it."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lead_kd.losses import lead_loss
from lead_kd.scores import gather_padded, gather_plain, gather_with_gradient, layer_scores


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, count, 5, generator=generator, dtype=torch.float64) for count in (4, 8)]


def loss_of(q, p, target):
    scores = layer_scores(q, p)
    # Weights of layers rest on a process's own queries: they are left out here.
    return lead_loss(scores, scores.detach().flip(0) * 0.7, target, [(0, 0), (1, 1)], reweight=False).total


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    q, p = inputs()
    mine_q = q[:, 2 * rank : 2 * rank + 2].clone()
    mine_p = p[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
    everywhere = gather_with_gradient(mine_p.transpose(0, 1)).transpose(0, 1)
    target = torch.tensor([0, 2]) + 4 * rank
    loss_of(mine_q, everywhere, target).backward()
    ragged = torch.ones(2, 2 + rank, 1) * (rank + 1)
    torch.save(
        {
            "grad": mine_p.grad,
            "ids": gather_plain(torch.tensor([rank, 10 + rank])),
            "padded": gather_padded(ragged),
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


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
