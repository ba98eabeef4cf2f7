"""Reading with the agent against reading everything, and training environments; writes bench.json.

    python packages/rlogist/benchmarks/bench.py --out runs/bench/rlogist

Modes are timed in turns in one process on the same generated slide files, from opening to the answer.
The network of a bench needs no training: time does not depend on where the agent looks.
"""

import argparse
import os
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
from shared_core.bench import finish, in_turns, row

HERE = "in this package"
"""Where the peers are."""


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


def read_times(path, model, timed, patch, repeats):
    """Of one slide: the fastest seconds of each mode, and at rho 0.1 the share beside reads and extractor."""
    known = []

    def read(**how):
        timed.seconds = 0.0
        with Slide(path, patch=patch) as slide:
            answer = model.predict(slide, **how)
        return timed.seconds + answer.ledger.total().seconds

    modes = (
        lambda: read(strategy="exhaustive"),
        lambda: known.append(read(rho=0.1)),
        lambda: read(rho=0.2),
    )
    times = in_turns(modes, repeats, clock=time.perf_counter)
    fastest = times[:, 1].argmin()
    return times.min(axis=0), 1 - known[fastest] / times[fastest, 1]


def reading_rows(paths, name, extractor, patch, repeats):
    """Medians over slides of the fastest of the repeats; the ratio is the median of the slides' ratios."""
    timed = Timed(extractor)
    model = fitted(timed)
    times, shares = zip(*(read_times(path, model, timed, patch, repeats) for path in paths), strict=True)
    whole, *agent = np.array(times).T
    peer = "exhaustive reading, same extractor and batches"
    for mode, ours in zip(("rho 0.1 (target x5)", "rho 0.2"), agent, strict=True):
        medians = float(np.median(ours)), float(np.median(whole))
        one = row(f"read a slide end to end, {name}, {mode}", *medians, peer, HERE, "s")
        yield one | {"ratio": float(np.median(whole / ours))}
    what = f"share beside reads and extractor, {name}, rho 0.1 (target 0.02)"
    yield row(what, float(np.median(shares)), 0.02, "target", "", "share")


def agent_rows(name, extractor, patch, regions, repeats):
    """What the agent takes for one look among many regions, against the extractor's batch of that look."""
    bag = random_bags(1, regions, 16, extractor.dim)[0]
    model = fitted(extractor)
    features = SlideFeatures(
        np.zeros((regions, 2), np.int64), bag.scan.numpy(), bag.deep.numpy(), np.arange(regions)
    )
    patches = np.random.default_rng(0).integers(0, 255, (16, patch, patch, 3)).astype(np.uint8)
    looks = []

    def look():
        found = model.predict(features, rho=0.02)
        looks.append(found.seconds / found.looks)

    times = in_turns((look, lambda: extractor(patches)), repeats, clock=time.perf_counter)
    what = f"policy, update and classifier for a look, {regions} regions, {extractor.dim}-d"
    yield row(what, min(looks), float(times[:, 1].min()), f"{name} for the same look", HERE, "s")


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
    env = BatchedFeatureVecEnv(make_store(bags, modules), modules, 32, rho=0.2)
    state, _ = plain.reset(seed=0)
    seen = env.reset()
    rounds = max(1, steps // 8)

    def one_by_one():
        nonlocal state
        for _ in range(steps):
            rows = torch.from_numpy(state)[None]
            with torch.no_grad():
                scores = policy(rows[..., :-2], rows[..., -2] > 0.5)
            allowed = torch.from_numpy(plain.action_masks())[None]
            state, _, done, _, _ = plain.step(int(masked(scores, allowed).argmax()))
            if done:
                state, _ = plain.reset()

    def batched():
        nonlocal seen
        for _ in range(rounds):
            with torch.no_grad():
                action = masked(policy(seen.states, seen.observed), seen.allowed).argmax(-1)
            seen, _, _ = env.step(action)

    slow, fast = in_turns((one_by_one, batched), 1, clock=time.perf_counter)[0].tolist()
    what = f"environment steps with the policy, 150 regions, {networks}"
    yield row(what, 32 * rounds / fast, steps / slow, "SlideEnv", HERE, "steps/s", more_is_better=True)


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
    found = list(rows(arguments.quick))
    finish("rlogist", found, arguments.out, threads=1, torch=metadata.version("torch"))


if __name__ == "__main__":
    main()
