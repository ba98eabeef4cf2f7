"""What each of two processes does in test_gather.py; a module by itself, which a new process can import."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

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
