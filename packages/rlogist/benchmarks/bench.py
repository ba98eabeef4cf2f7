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
from rlogist.extractors import Extractor
from rlogist.features import SlideFeatures
from rlogist.modules import masked
from rlogist.sources import CachedSource
from shared_core.files import write_json

PATCH = 64


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


def fitted(extractor):
    model = RLogist(extractor, rho=0.1)
    return model.fit(
        random_bags(4, 20, 16, extractor.dim),
        staged=StagedSettings(epochs=1, batch=4, global_epochs=1, mixed_epochs=1),
        ppo=PPOSettings(steps=16, n_envs=4, n_steps=4),
    )


def reading_rows(paths, name, extractor, repeats):
    model, timed = fitted(extractor), Timed(extractor)
    model._extractor = timed
    seconds = {key: [] for key in ("exhaustive", 0.1, 0.2)}
    overhead = []
    for path in paths:
        for mode, found in seconds.items():
            best = float("inf")
            for _ in range(repeats):
                timed.seconds = 0.0
                start = time.perf_counter()
                with Slide(path, patch=PATCH) as slide:
                    kind = {"strategy": "exhaustive"} if mode == "exhaustive" else {"rho": mode}
                    answer = model.predict(slide, **kind)
                wall = time.perf_counter() - start
                if wall < best:
                    best = wall
                    agent = wall - timed.seconds - answer.ledger.total().seconds
            found.append(best)
            if mode == 0.1:
                overhead.append(agent / best)
    whole = np.array(seconds["exhaustive"])
    for rho, target in ((0.1, 5.0), (0.2, None)):
        ours = np.array(seconds[rho])
        yield row(
            f"read a slide end to end, {name}, rho {rho}" + (f" (target x{target:g})" if target else ""),
            float(np.median(ours)),
            float(np.median(whole)),
            "exhaustive reading, same extractor and batches",
            float(np.median(whole / ours)),
        )
    yield row(
        f"wall time beside pixels and extractor, {name}, rho 0.1 (target 0.02)",
        float(np.median(overhead)),
        0.02,
        "target",
        0.02 / float(np.median(overhead)),
        "share",
    )


def environment_rows(steps):
    bags = random_bags(16, 150, 16, 36)
    model = fitted(load_extractor("stain"))
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
    yield row(
        "environment steps with the policy, 150 regions", fast, slow, "SlideEnv", fast / slow, "steps/s"
    )


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
    with TemporaryDirectory() as folder:
        made = make_demo_slides(folder, count, seed=5, world=DemoWorld(size=size))
        paths = [Path(folder, "slides", f"{slide.name}.tif") for slide in made]
        yield from reading_rows(paths, "stain", load_extractor("stain"), 1 if quick else 3)
        try:
            network = load_extractor("resnet50", pretrained=False)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            yield from reading_rows(paths[:1], "ResNet-50 (64 pixels, random)", network, 1)
    yield from environment_rows(80 if quick else 800)


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
