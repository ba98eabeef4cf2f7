"""The proof's experiments: generated slide files, features once, then every arm on the same splits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from openslide import OpenSlide

from rlogist.baselines import STRATEGIES, chooser_of
from rlogist.batched import BatchedFeatureVecEnv, FeatureStore, make_store, play
from rlogist.demo_slides import DemoSlide, DemoWorld, make_demo_slides, real_slide_bytes, write_pyramid
from rlogist.evaluate import accuracy, auc, auc_interval, hit_rate
from rlogist.extractors import load_extractor
from rlogist.features import extract_features, read_features
from rlogist.foreseeing import ForeseeRegions, foresight
from rlogist.full_observation import FullObservation, fit_scale
from rlogist.layouts import SlideRecord, split_patients
from rlogist.mil_baselines import MIL_POOLINGS, fit_pooled
from rlogist.mixed_states import MixedStates
from rlogist.model import RLogist
from rlogist.modules import Architecture, Modules, Policy, Update
from rlogist.parallel import Done, run_all
from rlogist.ppo import PPO, PPOSettings
from rlogist.slides import Slide
from rlogist.sources import Bag, bag_of
from rlogist.stage import derived_generator, run_stage
from rlogist.staged import StagedSettings
from shared_core import InputError

PATCH = 64
WORLD = DemoWorld(size=3072, group_radius=330.0, tumour_share=1.0, density=0.4)
SHARES = {"train": 0.56, "validation": 0.16, "test": 0.28}
UPDATES: tuple[Update, ...] = ("global", "targeted", "none")


STAGED = StagedSettings(
    epochs=80,
    track_from=5,
    patience=80,  # all epochs, and the best of them for validation slides
    lr=2e-3,
    warmup=5,
    final_lr=0.0,
    weight_decay=3e-3,
    batch=4,
    keep=0.5,
    instance_weight=0.0,
    global_epochs=5,
    global_lr=2e-3,
    mixed_epochs=20,
    mixed_lr=5e-4,
)
PPO_SETTINGS = PPOSettings(steps=7680, n_envs=16, n_steps=24, lr=2e-3, entropy=0.005)
NETWORKS = Architecture(
    36, width=16, hidden=16, attention="softmax", dropout=0.5, policy_hidden=32, whiten=0.01
)


@dataclass(frozen=True)
class Sizes:
    """How large the proof is.

    World and settings were chosen on slides of other seeds than the proof's.

    Args:
        starts: Initial weights of stage A that validation slides choose from, at most. Some learn 40 slides
            by heart and tell no others apart.
        enough: Cross-entropy of validation slides below which no further ones are tried: half of guessing's.
    """

    slides: int = 72
    world: DemoWorld = WORLD
    staged: StagedSettings = STAGED
    ppo: PPOSettings = PPO_SETTINGS
    architecture: Architecture = NETWORKS
    rhos: tuple[float, ...] = (0.1, 0.2)
    timed: int = 3
    starts: int = 4
    enough: float = math.log(2) / 2


QUICK = Sizes(
    slides=12,
    starts=1,
    world=replace(WORLD, size=1536, group_radius=200.0, groups=2),
    staged=replace(STAGED, epochs=10, track_from=2, warmup=2, global_epochs=2, mixed_epochs=2),
    ppo=replace(PPO_SETTINGS, steps=256, n_envs=8, n_steps=8),
    timed=1,
)


@dataclass(frozen=True)
class Dataset:
    """Slides, their features, and which regions hold tumour."""

    slides: list[DemoSlide]
    bags: list[Bag]
    tumour: list[np.ndarray]
    paths: list[Path]


def make_dataset(
    folder: Path, sizes: Sizes, seed: int, jobs: int, progress: Callable[[int, int], None] | None = None
) -> Dataset:
    """Generate slide files and read their features from them, once for all seeds."""
    from rlogist.annotations import read_annotations

    made = make_demo_slides(folder, sizes.slides, seed=seed, world=sizes.world, jobs=jobs, progress=progress)
    (folder / "features").mkdir(exist_ok=True)
    paths = [folder / "slides" / f"{slide.name}.tif" for slide in made]
    tasks = [(path, folder / "features" / f"{path.stem}.h5") for path in paths]
    for done in run_all(extract_one, tasks, jobs=jobs, progress=progress):
        if done.error:
            raise InputError(f"{paths[done.index].name}: {done.error}")
    bags, tumour = [], []
    for slide, (_, target) in zip(made, tasks, strict=True):
        features = read_features(target)
        bags.append(bag_of(features, slide.label, slide.name, slide.patient))
        hits = np.zeros(len(features), bool)
        annotation = folder / "annotations" / f"{slide.name}.xml"
        if annotation.is_file():
            footprint = int(features.attributes["patch_size_level0"])
            hits = read_annotations(annotation).hits(features.coords, footprint, share=0.5)
        tumour.append(hits)
    return Dataset(made, bags, tumour, paths)


def real_slides(folder: Path) -> tuple[Path, Path]:
    """The real slide as it is (.svs, one level), and a pyramid of its pixels that can be read as intended."""
    svs, pyramid = folder / "cmu.svs", folder / "cmu-pyramid.tif"
    svs.write_bytes(real_slide_bytes())
    with OpenSlide(svs) as slide:
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    write_pyramid(pyramid, pixels, mpp=0.499)
    return svs, pyramid


def extract_one(task: tuple[Path, Path]) -> None:
    """Read one slide's features, scan and deep."""
    torch.set_num_threads(1)
    with Slide(task[0], patch=PATCH) as slide:
        extract_features(slide, load_extractor("stain"), task[1], deep=True)


@dataclass(frozen=True)
class Split:
    """Slides of each side, by number; no patient is on two sides.

    Training slides train; validation slides choose stage A's start and epoch (and rival classifiers' epoch);
    test slides are judged once, after the last update.
    """

    train: list[int]
    validation: list[int]
    test: list[int]


def split(bags: Sequence[Bag], seed: int) -> Split:
    """The split of a seed."""
    records = [SlideRecord(Path(bag.name), bag.patient, str(bag.label)) for bag in bags]
    sides = [record.split for record in split_patients(records, SHARES, seed)]
    return Split(**{name: [i for i, side in enumerate(sides) if side == name] for name in SHARES})


Numbers = dict[str, dict[str, float]]


State = dict[str, torch.Tensor]


def run_seeds(
    data: Dataset,
    sizes: Sizes,
    seeds: Sequence[int],
    folder: Path,
    jobs: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Numbers]:
    """All arms of all seeds: for each seed, arm -> metric -> number. The first seed's model is saved.

    Args:
        data: The slides.
        sizes: How much of everything.
        seeds: Of splits and training.
        folder: Where the model of rho 0.2 is saved.
        jobs: Processes.
        progress: Called with (tasks done, tasks in all).
    """
    total = len(seeds) * (2 + len(UPDATES))
    report = progress or (lambda done, total: None)
    observed = _results(
        run_all(
            observe,
            [(data, sizes, seed, scan_only) for scan_only in (False, True) for seed in seeds],
            jobs=jobs,
            progress=lambda done, _: report(done, total),
        )
    )
    tasks = [
        (data, sizes, seed, update, state, folder if (seed, update) == (seeds[0], "global") else None)
        for seed, (_, state) in zip(seeds, observed[: len(seeds)], strict=True)
        for update in UPDATES
    ]
    after = _results(
        run_all(run_update, tasks, jobs=jobs, progress=lambda done, _: report(2 * len(seeds) + done, total))
    )
    numbers = [numbers for numbers, _ in observed]
    found = [low | full for full, low in zip(numbers[: len(seeds)], numbers[len(seeds) :], strict=True)]
    for index, numbers in enumerate(after):
        found[index // len(UPDATES)] |= numbers
    return found


def _results(done: Sequence[Done]) -> list[Any]:
    for one in done:
        if one.error:
            raise RuntimeError(one.fault or one.error)
    return [one.result for one in done]


def observe(task: tuple[Dataset, Sizes, int, bool]) -> tuple[Numbers, State]:
    """What chooses no regions: a classifier of a seed's scans alone, or stage A and classifiers on its V."""
    torch.set_num_threads(1)
    data, sizes, seed, scan_only = task
    sides = split(data.bags, seed)
    bags, held, judged = ([data.bags[i] for i in own] for own in (sides.train, sides.validation, sides.test))
    if scan_only:
        return {"low-res only": low_res(bags, held, judged, sizes, seed)}, {}
    modules = best_start(bags, held, sizes, seed)
    stores = [make_store(own, modules) for own in (bags, held, judged)]
    numbers = Numbers()
    for pooling in MIL_POOLINGS:
        rival = fit_pooled(pooling, *stores[:2], classes=2, seed=seed, width=sizes.architecture.width)
        with torch.no_grad():
            numbers[f"{pooling} of all regions"] = _scores(rival(stores[2].seen, stores[2].valid), stores[2])
    return numbers, modules.state_dict()


def best_start(
    bags: Sequence[Bag], held: Sequence[Bag], sizes: Sizes, seed: int, scan_only: bool = False
) -> Modules:
    """Stage A from several initial weights and orders; the lowest loss of validation slides chooses."""
    found: list[FullObservation] = []
    for start in range(sizes.starts):
        modules = Modules(sizes.architecture, derived_generator(seed, 6, start))
        fit_scale(modules, bags)
        stage = FullObservation(modules, bags, held, sizes.staged, seed + 1000 * start, scan_only)
        run_stage(stage)
        found.append(stage)
        if stage.best_loss < sizes.enough:
            break
    return min(found, key=lambda stage: stage.best_loss).modules


def run_update(task: tuple[Dataset, Sizes, int, Update, State, Path | None]) -> Numbers:
    """Stages B, B2 and C of a seed with one form of update; the rivals beside it where it is `global`."""
    torch.set_num_threads(1)
    data, sizes, seed, update, state, folder = task
    sides = split(data.bags, seed)
    bags, judged = [data.bags[i] for i in sides.train], [data.bags[i] for i in sides.test]
    model = _model(bags, sizes, seed)
    modules = model.modules
    modules.load_state_dict(state)
    store = make_store(bags, modules)
    run_stage(ForeseeRegions(modules, store, sizes.staged, seed, update))
    run_stage(MixedStates(modules, store, sizes.staged, seed, update))
    unseen, found = make_store(judged, modules), Numbers()
    if update == "global":
        found["full observation"] = _full(modules, unseen)
        error, without = foresight(unseen, modules, 0.2, seed)
        found["f_global"] = {"mse": error, "mse_without": without}
    # The ablations at the larger rho only: three minutes are the budget.
    for rho in sizes.rhos if update == "global" else sizes.rhos[-1:]:
        policy = _reinforce(model, store, sizes, rho, seed, update)
        for strategy in STRATEGIES if update == "global" else STRATEGIES[:1]:
            played = play(unseen, modules, chooser_of(strategy, modules, policy, seed), rho, update)
            own = "rlogist" if update == "global" else f"rlogist, update {update}"
            name = own if strategy == "policy" else strategy
            paths = [[int(i) for i in path if i >= 0] for path in played.path]
            hits = hit_rate(paths, [data.tumour[i] for i in sides.test])
            found[f"{name} @{rho:g}"] = {**_scores(played.logits, unseen), "hits": hits or 0.0}
    if folder is not None:
        model.rho = sizes.rhos[-1]
        model.opening["patch"] = PATCH
        model.save_pretrained(folder)
    return found


def _model(bags: Sequence[Bag], sizes: Sizes, seed: int) -> RLogist:
    model = RLogist("stain", architecture=sizes.architecture, seed=seed, classes=["no tumour", "tumour"])
    model.begin(bags)
    return model


def low_res(
    bags: Sequence[Bag], held: Sequence[Bag], judged: Sequence[Bag], sizes: Sizes, seed: int
) -> dict[str, float]:
    """A classifier of its own on the scan alone, trained with the same care."""
    modules = best_start(bags, held, sizes, seed, scan_only=True)
    store = make_store(judged, modules)
    with torch.no_grad():
        return _scores(modules.classifier(store.scan, store.valid), store)


@torch.no_grad()
def _full(modules: Modules, store: FeatureStore) -> dict[str, float]:
    return _scores(modules.eval().classifier(store.seen, store.valid), store)


def _reinforce(
    model: RLogist, store: FeatureStore, sizes: Sizes, rho: float, seed: int, update: Update
) -> Policy:
    """Stage C with fresh policy and critic; the last update's policy counts."""
    model.fresh_policy()
    env = BatchedFeatureVecEnv(
        store, model.modules, sizes.ppo.n_envs, rho=rho, reward="delta_ce", update=update, seed=seed
    )
    run_stage(PPO(env, model.policy, model.critic, sizes.ppo, seed))
    return model.policy


def _scores(logits: torch.Tensor, store: FeatureStore) -> dict[str, float]:
    probability, label = torch.softmax(logits.double(), -1).numpy(), store.label.numpy()
    low, high = auc_interval(probability, label, draws=200)
    return {
        "auc": auc(probability, label),
        "auc_low": low,
        "auc_high": high,
        "accuracy": accuracy(probability, label),
    }


@dataclass(frozen=True)
class Timing:
    """What reading slide files took; medians over slides, each slide read by every mode in turn."""

    seconds: dict[str, float]
    deep_pixels: dict[str, float]
    reads: dict[str, float]
    ratio: dict[str, float]


def time_reading(paths: Sequence[Path], model: RLogist, rhos: Sequence[float]) -> Timing:
    """Read slides from their files with the agent and exhaustively; opening and segmentation count too."""
    modes = {"exhaustive": ("exhaustive", 1.0), **{f"rlogist @{rho:g}": ("policy", rho) for rho in rhos}}
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    pixels: dict[str, list[float]] = {name: [] for name in modes}
    reads: dict[str, list[float]] = {name: [] for name in modes}
    for path in paths:
        for name, (strategy, rho) in modes.items():
            with Slide(path, patch=PATCH) as slide:
                found = model.predict(slide, strategy=strategy, rho=rho)  # pyright: ignore[reportArgumentType]
            seconds[name].append(found.seconds)
            pixels[name].append(found.ledger.total("deep").pixels)
            reads[name].append(found.reads)
    ratio = {
        name: median(own / whole for own, whole in zip(values, seconds["exhaustive"], strict=True))
        for name, values in seconds.items()
    }
    return Timing(_medians(seconds), _medians(pixels), _medians(reads), ratio)


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(median(own)) for name, own in values.items()}
