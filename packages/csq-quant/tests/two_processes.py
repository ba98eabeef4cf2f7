"""What each of the two processes of test_distributed.py does; a module that they can import."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hosted_models import images, optimizer_for, small_net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import csq

STEPS = 24


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)  # different starts: the wrapper must make them alike
    model = DistributedDataParallel(csq.parametrize(small_net(), kernel="eager"))
    optimizer = optimizer_for(model)
    schedule = csq.Schedule(model, 3.0, STEPS, lam=0.3, on_miss="settle", trace_every=1)
    x, y = images(32)
    x, y = x[rank::2], y[rank::2]
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x), y) + schedule.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    temperatures = [float(planes.temperature) for planes in csq.bit_layers(model).values()]
    kept = {"state": model.module.state_dict(), "trace": schedule.trace, "temperatures": temperatures}
    torch.save(kept, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
