"""Reading with the agent against reading everything, and training environments; writes bench.json.

    python packages/rlogist/benchmarks/bench.py --out runs/bench/rlogist

Modes are timed in turns in one process on the same generated slide files, from opening to the answer.
The network of a bench needs no training: time does not depend on where the agent looks.
"""

import argparse
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from rlogist import Bag, PPOSettings, RLogist, Slide, StagedSettings, load_extractor, make_demo_slides
from rlogist.batched import BatchedFeatureVecEnv, make_store
from rlogist.demo_slides import DemoWorld
from rlogist.environment import SlideEnv
from rlogist.experiments import NETWORKS
from rlogist.extractors import Extractor
from rlogist.features import SlideFeatures
from rlogist.modules import masked
from rlogist.sources import CachedSource
from shared_core.files import write_json


class Timed:
    """An extractor that adds up its own time."""

    def __init__(self, own: Extractor):
        self.own, self.seconds = own, 0.0
        self.name, self.dim, self.fingerprint = own.name, own.dim, own.fingerprint

    def __call__(self, patches):
        start = time.perf_counter()
        found = self.own(patches)
        self.seconds += time.perf_counter() - start
        return found


def random_bags(count, regions, patches, dim):
    g = torch.Generator().manual_seed(0)
    return [
        Bag(torch.randn(regions, dim, generator=g), torch.randn(regions, patches, dim, generator=g), i % 2)
        for i in range(count)
    ]


def fitted(extractor, architecture=None):
    model = RLogist(extractor, rho=0.1, architecture=architecture)
    return model.fit(
        random_bags(4, 20, 16, extractor.dim),
        staged=StagedSettings(epochs=1, batch=4, global_epochs=1, mixed_epochs=1),
        ppo=PPOSettings(steps=16, n_envs=4, n_steps=4),
    )


def read_once(path, model, timed, patch, mode):
    """Wall seconds from opening to the answer, and the part that is neither reads nor the extractor."""
    timed.seconds = 0.0
    start = time.perf_counter()
    with Slide(path, patch=patch) as slide:
        if mode == "exhaustive":
            answer = model.predict(slide, strategy="exhaustive")
        else:
            answer = model.predict(slide, rho=mode)
    wall = time.perf_counter() - start
    return wall, wall - timed.seconds - answer.ledger.total().seconds


def reading_rows(paths, name, extractor, patch, repeats):
    """Modes in turns; of each slide and mode the fastest of the repeats."""
    timed = Timed(extractor)
    model = fitted(timed)
    modes = ("exhaustive", 0.1, 0.2)
    fastest = {mode: [] for mode in modes}
    for path in paths:
        runs = [[read_once(path, model, timed, patch, mode) for mode in modes] for _ in range(repeats)]
        for mode, own in zip(modes, zip(*runs, strict=True), strict=True):
            fastest[mode].append(min(own))
    whole = np.array([wall for wall, _ in fastest["exhaustive"]])
    for rho, target in ((0.1, " (target x5)"), (0.2, "")):
        ours = np.array([wall for wall, _ in fastest[rho]])
        yield row(
            f"read a slide end to end, {name}, rho {rho}{target}",
            float(np.median(ours)),
            float(np.median(whole)),
            "exhaustive reading, same extractor and batches",
            float(np.median(whole / ours)),
        )
    share = float(np.median([rest / wall for wall, rest in fastest[0.1]]))
    what = f"share beside reads and extractor, {name}, rho 0.1 (target 0.02)"
    yield row(what, share, 0.02, "target", 0.02 / share, "share")


def agent_rows(name, extractor, patch, regions, repeats):
    """What the agent takes for one look among many regions, against the extractor's batch of that look."""
    bag = random_bags(1, regions, 16, extractor.dim)[0]
    model = fitted(extractor)
    features = SlideFeatures(
        np.zeros((regions, 2), np.int64), bag.scan.numpy(), bag.deep.numpy(), np.arange(regions)
    )
    patches = np.random.default_rng(0).integers(0, 255, (16, patch, patch, 3)).astype(np.uint8)
    looks, encoded = [], []
    for _ in range(repeats):
        found = model.predict(features, rho=0.02)
        looks.append(found.seconds / found.looks)
        start = time.perf_counter()
        extractor(patches)
        encoded.append(time.perf_counter() - start)
    what = f"policy, update and classifier for a look, {regions} regions, {extractor.dim}-d"
    yield row(what, min(looks), min(encoded), f"{name} for the same look", min(encoded) / min(looks))


def environment_rows(steps, networks, architecture=None):
    bags = random_bags(16, 150, 16, 36)
    model = fitted(load_extractor("stain"), architecture)
    modules, policy = model.modules, model.policy
    sources = [
        CachedSource(
            SlideFeatures(
                np.zeros((len(b), 2), np.int64), b.scan.numpy(), b.deep.numpy(), np.arange(len(b)), {}
            )
        )
        for b in bags
    ]
    plain = SlideEnv(sources, modules, [b.label for b in bags], rho=0.2)
    state, _ = plain.reset(seed=0)
    start = time.perf_counter()
    for _ in range(steps):
        rows = torch.from_numpy(state)[None]
        with torch.no_grad():
            scores = policy(rows[..., :-2], rows[..., -2] > 0.5)
        allowed = torch.from_numpy(plain.action_masks())[None]
        state, _, done, _, _ = plain.step(int(masked(scores, allowed).argmax()))
        if done:
            state, _ = plain.reset()
    slow = steps / (time.perf_counter() - start)
    env = BatchedFeatureVecEnv(make_store(bags, modules), modules, 32, rho=0.2)
    seen = env.reset()
    start = time.perf_counter()
    for _ in range(max(1, steps // 8)):
        with torch.no_grad():
            action = masked(policy(seen.states, seen.observed), seen.allowed).argmax(-1)
        seen, _, _ = env.step(action)
    fast = 32 * max(1, steps // 8) / (time.perf_counter() - start)
    what = f"environment steps with the policy, 150 regions, {networks}"
    yield row(what, fast, slow, "SlideEnv", fast / slow, "steps/s")


def row(what, ours, theirs, peer, ratio, unit="s"):
    return {
        "what": what,
        "ours": ours,
        "theirs": theirs,
        "peer": peer,
        "peer_version": "in this package",
        "ratio": ratio,
        "unit": unit,
    }


def rows(quick):
    torch.set_num_threads(1)
    size, count = (1536, 1) if quick else (4096, 3)
    large, repeats = (2048, 1) if quick else (8192, 2)
    with TemporaryDirectory() as folder:
        made = make_demo_slides(f"{folder}/small", count, seed=5, world=DemoWorld(size=size))
        paths = [Path(folder, "small/slides", f"{slide.name}.tif") for slide in made]
        yield from reading_rows(paths, "stain, 64 pixels", load_extractor("stain"), 64, repeats)
        try:
            network = load_extractor("timm/resnet18", pretrained=False)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            made = make_demo_slides(f"{folder}/large", 1, seed=5, world=DemoWorld(size=large))
            path = Path(folder, "large/slides", f"{made[0].name}.tif")
            name = "ResNet-18, 224 pixels"
            yield from reading_rows([path], name, network, 224, repeats)
            yield from agent_rows(name, network, 224, 100 if quick else 1000, repeats)
    steps = 80 if quick else 800
    yield from environment_rows(steps, "networks of the released widths")
    yield from environment_rows(steps, "networks of the proof", NETWORKS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = []
    for entry in rows(arguments.quick):
        print(
            f"{entry['what']:72} {entry['ours']:10.4g} {entry['theirs']:10.4g} {entry['unit']:8} "
            f"x{entry['ratio']:.2f}  {entry['peer']}",
            flush=True,
        )
        found.append(entry)
    machine = {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": metadata.version("torch"),
    }
    write_json(arguments.out / "bench.json", {"package": "rlogist", "machine": machine, "rows": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
