"""Small worlds of features for the tests of the agent."""

from __future__ import annotations

import torch

from rlogist.model import RLogist
from rlogist.modules import Architecture, Modules
from rlogist.ppo import PPOSettings
from rlogist.sources import Bag
from rlogist.staged import StagedSettings

DIM, PATCHES = 6, 4


def bags(count: int = 12, seed: int = 0, sizes: tuple[int, int] = (12, 20)) -> list[Bag]:
    """Slides where a few regions look suspicious at the scan; deep features tell whether they are tumour."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        label, size = index % 2, int(torch.randint(sizes[0], sizes[1] + 1, (), generator=g))
        scan = torch.randn(size, DIM, generator=g) * 0.3
        deep = scan.unsqueeze(1) + 0.3 * torch.randn(size, PATCHES, DIM, generator=g)
        deep[..., 3] += scan[:, :1]  # what a look would show can be foreseen in part
        deep[..., 4] += 1.5  # all features differ a little between the magnifications
        scan[:4, 0] += 2
        deep[:4, :, 0] += 2
        deep[:4, :, 1] += 3 if label else -3
        order = torch.randperm(size, generator=g)
        found.append(Bag(scan[order], deep[order], label, f"s{seed}-{index}", f"p{seed}-{index}"))
    return found


def architecture(**changes) -> Architecture:
    return Architecture(**({"dim": DIM, "width": 16, "hidden": 8, "policy_hidden": 16} | changes))


def modules(seed: int = 0, moving: bool = True, **changes) -> Modules:
    """Random networks; `moving` gives f_global random last weights, since untrained it changes nothing."""
    made = Modules(architecture(**changes), torch.Generator().manual_seed(seed))
    if moving:
        torch.nn.init.normal_(
            made.f_global.change.weight, std=0.2, generator=torch.Generator().manual_seed(seed)
        )
    return made.eval()


def resumable(folder, on_epoch=None) -> RLogist:
    """A short training of all stages that goes on from the folder's checkpoint."""
    return RLogist("stain", architecture=architecture(), seed=3).fit(
        bags(8),
        bags(4, seed=1),
        folder=folder,
        resume=True,
        on_epoch=on_epoch,
        staged=StagedSettings(epochs=6, batch=2, track_from=1, min_epochs=2, global_epochs=3, mixed_epochs=3),
        ppo=PPOSettings(steps=96, n_envs=4, n_steps=4),
    )
