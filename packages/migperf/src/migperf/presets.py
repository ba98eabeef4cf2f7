"""The paper's studies as cells of a sweep: profiles, batches, lengths, threads and rates of its scripts.

Source: the official project's experiment scripts. They time 1000 batches after 100 of
warm-up (training: 500 steps); here a window of time is measured, after a warm-up to the steady state.
"""

from collections.abc import Sequence
from dataclasses import replace

from migperf.loads import CLOSED, Closed, Load, Poisson
from migperf.profiles import HasLayout, Layout, layout_of
from migperf.sweeps import Cell, cells
from migperf.workloads import Workload, parse, torchvision, transformers
from shared_core import InputError

STUDIES = ("inference", "sequence", "training", "training-sequence", "compute", "sharing", "models", "rates")

BLOCK, ASYNC = CLOSED, Closed(4)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
TRAINING_BATCHES = (16, 32, 64, 128, 256, 512)
LENGTHS = (32, 64, 128, 256)
RATES = (25, 50, 75, 100, 125, 150, 200)
SEED = 666
ARRIVAL_SECONDS = 30.0
SHARING_MODELS = (
    "torchvision/resnet18",
    "torchvision/resnet34",
    "torchvision/resnet50",
    "torchvision/resnet101",
    "transformers/distilbert-base-cased",
    "transformers/bert-base-cased",
    "transformers/bert-large-cased",
)


def paper(study: str, device: Layout | HasLayout | str) -> list[Cell]:
    """Return the cells of one of the paper's studies on a device.

    Args:
        study: `inference`: ResNet-50 and BERT-base at batches 1 to 64, block and async, one instance of each
            size alone. `sequence`: BERT-base at batch 32, lengths 32 to 256. `training`, `training-sequence`:
            batches 16 to 512; lengths at batch 128. `compute`: 1 to 7 compute slices of the largest instance.
            `sharing`: equal parts, 1, 2 and 4 of them, over batches; `models`: over models at batch 32;
            `rates`: Poisson arrivals at each part, batch 1.
        device: A layout, a backend, or the name of a model. On a backend without MIG the same study is the
            paper's "MIG off".

    Raises:
        InputError: There is no such study, or the device has no such parts.
    """
    known = layout_of(device)
    alone = characterised(known)
    resnet, bert = torchvision("resnet50", batch=32), transformers("bert-base-cased", batch=32)
    if study == "inference":
        works = [*_batches(resnet, BATCHES), *_batches(bert, BATCHES)]
        return cells(alone, works, [BLOCK, ASYNC])
    if study == "sequence":
        return cells(alone, _lengths("infer", 32), [BLOCK])
    if study == "training":
        places = torchvision("resnet50", mode="train", classes=365, batch=16)
        reviews = transformers("bert-base-cased", mode="train", classes=5, batch=16)
        return cells(alone, [*_batches(places, TRAINING_BATCHES), *_batches(reviews, TRAINING_BATCHES)])
    if study == "training-sequence":
        return cells(alone, _lengths("train", 128))
    if study == "compute":
        return cells(_compute(known), _batches(resnet, BATCHES), [BLOCK])
    if study == "sharing":
        return cells(equal_parts(known), _batches(resnet, BATCHES), [BLOCK])
    if study == "models":
        return cells(equal_parts(known), [_named(name) for name in SHARING_MODELS], [BLOCK])
    if study == "rates":
        rates: list[Load] = [Poisson(rate, seed=SEED) for rate in RATES]
        return cells(equal_parts(known), [torchvision("resnet50"), transformers("bert-base-cased")], rates)
    raise InputError(f"expected one of {', '.join(STUDIES)}", field="study", value=study)


def characterised(layout: Layout) -> list[str]:
    """Return the profiles that the paper sweeps: for each number of compute slices the least memory.

    >>> characterised(layout_of("a100-80gb"))
    ['1g.10gb', '2g.20gb', '3g.40gb', '4g.40gb', '7g.80gb']
    """
    least: dict[int, tuple[int, str]] = {}
    for profile in layout.profiles:
        if "+" in profile.name or "-" in profile.name:
            continue
        found = profile.size, profile.name
        least[profile.slices] = min(found, least.get(profile.slices, found))
    return [name for _, (_, name) in sorted(least.items())]


def equal_parts(layout: Layout, counts: Sequence[int] = (1, 2, 4)) -> list[str]:
    """Return the device cut into 1, 2 and 4 equal parts, as large as they can be.

    >>> equal_parts(layout_of("a30-24gb"))
    ['4g.24gb*1', '2g.12gb*2', '1g.6gb*4']
    """
    names = characterised(layout)
    found = []
    for count in counts:
        fitting = [p for p in layout.profiles if p.name in names and p.maximum >= count]
        if not fitting:
            raise InputError(f"{layout.device} cannot be cut into {count} equal parts", field="device")
        part = max(fitting, key=lambda profile: (profile.slices, profile.size))
        found.append(f"{part.name}*{count}")
    return found


def _compute(layout: Layout) -> list[str]:
    """Return one GPU instance of all memory with compute instances of 1 to all slices."""
    largest = max(
        layout.profiles, key=lambda profile: (profile.size, profile.slices, "+" not in profile.name)
    )
    sizes = [size for size in (1, 2, 3, 4, 7) if size <= largest.slices]
    return [largest.name if size == largest.slices else f"{size}c.{largest.name}" for size in sizes]


def _batches(workload: Workload, batches: Sequence[int]) -> list[Workload]:
    return [replace(workload, batch=batch) for batch in batches]


def _lengths(mode: str, batch: int) -> list[Workload]:
    return [
        transformers("bert-base-cased", mode=mode, batch=batch, sequence_length=length) for length in LENGTHS
    ]


def _named(name: str) -> Workload:
    return parse(name, batch=32)
