"""The proof's images: real digits on real photographs, each beside the surroundings of its class.

A digit (MNIST, 28x28) stands near the middle of a photograph's crop. Beside it lies its *context*, an ellipse
out of another photograph. Five photographs are contexts, and every two classes share one: in training the
context is the class's own in 19 of 20 images, so it says which two classes come into question.
In the slice ``apart`` the context is always another pair's. Validation images are half of one kind, half of
the other.

Training scenes take digits and parts of photographs that no other scene has: photographs are cut in two.
The network that all methods start from has learned to name other digits and the contexts, each alone on a
ground: it can see both, as one that has learned ImageNet can see a duck and a lake.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from kdcicam.images import Augmentation
from shared_core.datasets import mnist5k, photographs
from shared_core.files import atomic_path, write_json

Array = np.ndarray
SIZE = 48
CLASSES = 10
CONTEXTS = ("hubble_deep_field", "retina", "rocket", "chelsea", "coffee")
GROUNDS = ("china", "flower", "astronaut", "motorcycle_left")
OWN = 0.95
"""Share of scenes whose context is the class's own."""
DIGIT, CONTEXT = (17, 24), (18, 26)
"""Sides in pixels, drawn uniformly."""
SPREAD = 4.0
"""Standard deviation of the digit's centre about the image's, in pixels."""
DIM = 0.45
"""Brightness of the ground, as a share of the photograph's own: the ink is bright."""
TRAIN_PART = 0.6
"""Share of each photograph, from the left, that training scenes are cut from."""


START_FROM = 300
"""Digits of a class from this number on (of 500) are the start's; those before are for scenes."""


@dataclass(frozen=True)
class Sizes:
    """Scenes of each class."""

    train: int = 40
    val: int = 24
    """Half with the class's own context, half with another's."""
    test: int = 20
    """In each slice."""
    start: int = 200
    """For the common start: digits of each class, and as many of each context."""


@dataclass(frozen=True)
class Scene:
    """One image with what is where in it."""

    image: Image.Image
    label: int
    box: tuple[int, int, int, int]
    context: Array
    """Where the context shows, [size, size]."""


class Sources:
    """Digits by class, and the two parts of each photograph, shrunk so that crops show more than texture."""

    def __init__(self, shrink: float = 0.4) -> None:
        rows: Any = mnist5k()
        pixels = np.stack([np.asarray(image) for image in rows["image"]])
        labels = np.asarray(rows["label"])
        self.digits = {k: pixels[labels == k] for k in range(CLASSES)}
        pictures: Any = photographs()
        self.left: dict[str, Image.Image] = {}
        self.right: dict[str, Image.Image] = {}
        for row in pictures:
            picture = row["image"].convert("RGB")
            scale = max(shrink, 2.4 * SIZE / picture.height)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            cut = round(TRAIN_PART * picture.width)
            self.left[row["name"]] = picture.crop((0, 0, cut, picture.height))
            self.right[row["name"]] = picture.crop((cut, 0, *picture.size))


def own_context(label: int) -> int:
    """Number of the context that a class comes with."""
    return label // (CLASSES // len(CONTEXTS))


def make_scene(sources: Sources, label: int, digit: int, part: str, generator: np.random.Generator) -> Scene:
    """Make one scene.

    Args:
        sources: Of digits and photographs.
        label: The class.
        digit: Which of its digits.
        part: ``train``, ``val``, ``together``, or ``apart`` and ``val-apart``; ``start`` has no context.
        generator: Of everything that is drawn.
    """
    pictures = sources.left if part in ("train", "start") else sources.right
    ground = _crop(pictures[str(generator.choice(GROUNDS))], generator)
    ink = _ink(sources.digits[label][digit], int(generator.integers(*DIGIT, endpoint=True)))
    height, width = ink.shape
    centre = SIZE / 2 + SPREAD * generator.standard_normal(2)
    x, y = (
        int(np.clip(round(c - s / 2), 1, SIZE - s - 1)) for c, s in zip(centre, (width, height), strict=True)
    )
    box = (x, y, x + width, y + height)
    canvas = DIM * ground
    context = np.zeros((SIZE, SIZE), dtype=bool)
    if part != "start":
        context = _ellipse(box, generator)
        habitat = _crop(pictures[CONTEXTS[_context_of(label, part, generator)]], generator)
        canvas = np.where(context[..., None], habitat, canvas)
    area = canvas[y : y + height, x : x + width]
    area += (generator.uniform(200, 255, 3) - area) * ink[..., None]
    context[y : y + height, x : x + width] &= ink < 0.5
    return Scene(Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8)), label, box, context)


def _context_of(label: int, part: str, generator: np.random.Generator) -> int:
    own = own_context(label)
    if not part.endswith("apart") and generator.random() < OWN:
        return own
    return int(generator.choice([c for c in range(len(CONTEXTS)) if c != own]))


def _crop(picture: Image.Image, generator: np.random.Generator) -> Array:
    x, y = (int(generator.integers(0, extent - SIZE + 1)) for extent in picture.size)
    return np.asarray(picture.crop((x, y, x + SIZE, y + SIZE)), dtype=np.float64)


def _ink(digit: Array, side: int) -> Array:
    """The digit cut to its ink, its longer side as asked for, as shares of ink from 0 to 1."""
    rows, columns = (np.flatnonzero((digit > 64).any(axis)) for axis in (1, 0))
    bold = Image.fromarray(digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).filter(
        ImageFilter.MaxFilter(3)
    )
    scale = side / max(bold.size)
    size = tuple(max(3, round(s * scale)) for s in bold.size)
    return np.asarray(bold.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / 255  # type: ignore[arg-type]


def _ellipse(box: tuple[int, int, int, int], generator: np.random.Generator) -> Array:
    """An ellipse that touches the box on one of its four sides."""
    width, height = (int(s) for s in generator.integers(*CONTEXT, 2, endpoint=True))
    x0, y0, x1, y1 = box
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    side, slide = int(generator.integers(4)), generator.uniform(-4, 4)
    if side < 2:
        cx, cy = (x0 - width / 2 if side == 0 else x1 + width / 2), cy + slide
    else:
        cx, cy = cx + slide, (y0 - height / 2 if side == 2 else y1 + height / 2)
    ys, xs = np.mgrid[:SIZE, :SIZE] + 0.5
    return ((xs - cx) / (width / 2)) ** 2 + ((ys - cy) / (height / 2)) ** 2 <= 1


def make_scenes(sources: Sources, sizes: Sizes, seed: int) -> dict[str, list[Scene]]:
    """All scenes of a seed, by part (``train``, ``val``, ``together``, ``apart``); no digit is in two."""
    made: dict[str, list[Scene]] = {}
    orders = [np.random.default_rng([seed, k]).permutation(START_FROM) for k in range(CLASSES)]
    half = sizes.val // 2
    counts = {
        "train": sizes.train,
        "val": sizes.val - half,
        "val-apart": half,
        "together": sizes.test,
        "apart": sizes.test,
    }
    first = 0
    for number, (part, count) in enumerate(counts.items()):
        generator = np.random.default_rng([seed, CLASSES, number])
        made[part] = [
            make_scene(sources, label, int(orders[label][first + index]), part, generator)
            for label in range(CLASSES)
            for index in range(count)
        ]
        first += count
    made["val"] = sorted(made["val"] + made.pop("val-apart"), key=lambda scene: scene.label)
    return made


def make_start_scenes(sources: Sources, count: int, seed: int) -> list[Scene]:
    """`count` digits of each class (labels 0 to 9) and `count` pieces of each context (from 10 on), alone."""
    generator = np.random.default_rng([seed, CLASSES + 1])
    digits = [
        make_scene(sources, label, START_FROM + index, "start", generator)
        for label in range(CLASSES)
        for index in range(count)
    ]
    contexts = [
        _context_alone(sources, number, generator) for number in range(len(CONTEXTS)) for _ in range(count)
    ]
    return digits + contexts


def _context_alone(sources: Sources, number: int, generator: np.random.Generator) -> Scene:
    canvas = DIM * _crop(sources.left[str(generator.choice(GROUNDS))], generator)
    width, height = (int(side) for side in generator.integers(*DIGIT, 2, endpoint=True))
    x, y = (int(generator.integers(1, SIZE - side)) for side in (width, height))
    box = (x, y, x + width, y + height)  # an ellipse touches it, as it would a digit's
    context = _ellipse(box, generator)
    canvas = np.where(context[..., None], _crop(sources.left[CONTEXTS[number]], generator), canvas)
    return Scene(Image.fromarray(canvas.round().astype(np.uint8)), CLASSES + number, box, context)


class StartScenes(Dataset[tuple[Tensor, int, int]]):
    """Scenes in memory, as `kdcicam.training.train` takes them."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes
        self.whole = Augmentation.parse("whole")

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        scene = self.scenes[key[1]]
        return self.whole(scene.image, SIZE), scene.label, 0


def masks_file(root: Path, split: str) -> Path:
    """Where the context shows in the images of ``val`` or ``test``, bool [images, size, size]."""
    return root / f"{split}-contexts.npy"


def apart_root(root: Path) -> Path:
    """Where `write_scenes` puts the slice whose contexts are apart: a data set beside the other."""
    return root.with_name(f"{root.name}-apart")


def write_scenes(root: Path, scenes: dict[str, list[Scene]]) -> None:
    """Write them as a user's own data: ``train``, ``val``, ``test`` with class folders and COCO boxes."""
    for part, found in scenes.items():
        base = apart_root(root) if part == "apart" else root
        split = {"together": "test", "apart": "test"}.get(part, part)
        entries, notes = [], []
        for number, scene in enumerate(found):
            file = f"{scene.label}/{number:04d}.png"
            (base / split / str(scene.label)).mkdir(parents=True, exist_ok=True)
            scene.image.save(base / split / file)
            entries.append({"id": number, "file_name": file, "width": SIZE, "height": SIZE})
            x0, y0, x1, y1 = scene.box
            notes.append({"id": number, "image_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        write_json(base / f"{split}.json", {"images": entries, "annotations": notes})
        if split != "train":
            with atomic_path(masks_file(base, split)) as temporary, temporary.open("wb") as file:
                np.save(file, np.stack([scene.context for scene in found]))
