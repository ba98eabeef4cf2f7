"""A frozen dual encoder's vectors of all layers, computed once and kept in memory-mapped files.

With six layers of 384 numbers in float16 an item takes 5.4 kB. Texts are found by their hash, so that neither
trainers nor collators have to carry row numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lead_kd.candidates import Kind, text_key
from lead_kd.scorers import Batch, DualEncoder, Scorer, to_device, tokens_of, vector_scores
from lead_kd.scores import Scores, gather_plain
from shared_core import InputError
from shared_core.files import atomic_path, write_json

_VERSION = 1
_HEAD, _PROGRESS, _LAYERS, _FINAL, _KEYS = (
    "cache.json",
    "progress.json",
    "layers.npy",
    "final.npy",
    "keys.npy",
)


def fingerprint(teacher: DualEncoder) -> str:
    """Return a hash of all that a teacher's vectors depend on: weights, modules, prompts and lengths."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(teacher.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    settings = (str(teacher.model), teacher.model.prompts, teacher.query_length, teacher.passage_length)
    found.update(repr(settings).encode())
    return found.hexdigest()


class TeacherCache:
    """Vectors of a teacher's layers for known texts.

    Args:
        folder: What `build_cache` made.

    Raises:
        InputError: The folder holds no finished cache, or its files do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.head = _read_json(self.folder / _HEAD)
        if self.head.get("version") != _VERSION:
            raise InputError(
                f"expected version {_VERSION}; build it again", file=self.folder / _HEAD, field="version",
                value=self.head.get("version"),
            )  # fmt: skip
        self.layers = np.load(self.folder / _LAYERS, mmap_mode="r")
        self.final = np.load(self.folder / _FINAL, mmap_mode="r")
        keys = np.load(self.folder / _KEYS)
        if not len(keys) == len(self.layers) == len(self.final) == self.head["items"]:
            raise InputError("its files differ in length; build it again", file=self.folder)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def rows(self, kind: Kind, texts: Sequence[str]) -> np.ndarray:
        """Find texts.

        Raises:
            InputError: A text is not in the cache.
        """
        wanted = np.array([text_key(kind, text) for text in texts], np.uint64)
        places = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        missing = np.flatnonzero(self._sorted[places] != wanted)
        if len(missing):
            raise InputError(
                f"has no vectors of this {kind}; build the cache for these data, titles and texts alike",
                file=self.folder,
                value=texts[missing[0]],
            )
        return self._order[places]

    def vectors(
        self, kind: Kind, texts: Sequence[str]
    ) -> tuple[Float[Tensor, "texts layers dim"], Float[Tensor, "texts final_dim"]]:
        """Read the vectors of texts, as float32."""
        rows = self.rows(kind, texts)
        return (
            torch.from_numpy(self.layers[rows].astype(np.float32)),
            torch.from_numpy(self.final[rows].astype(np.float32)),
        )


class CachedTeacher(Scorer):
    """A frozen dual encoder that is read from its cache.

    Args:
        cache: The cache.
        teacher: The teacher that it should be of; checked where given.

    Raises:
        InputError: The cache is of another teacher, or of the same with other lengths or prompts.
    """

    def __init__(self, cache: TeacherCache, teacher: DualEncoder | None = None) -> None:
        super().__init__()
        if teacher is not None and fingerprint(teacher) != cache.head["teacher"]:
            raise InputError(
                "was made by another teacher, or with other lengths or prompts; build it again",
                file=cache.folder,
            )
        self.cache = cache
        self.n_layers = int(cache.layers.shape[1])
        self.scale = float(cache.head["scale"])

    def collate(self, queries: Sequence[str], passages: Sequence[str]) -> Batch:
        """Read the texts' vectors."""
        q_layers, q_final = self.cache.vectors("query", queries)
        p_layers, p_final = self.cache.vectors("passage", passages)
        return {"q_layers": q_layers, "q_final": q_final, "p_layers": p_layers, "p_final": p_final}

    def forward(self, batch: Batch, layers: Sequence[int] | None = None) -> Scores:
        """Score every query against the passages of all processes."""
        q_layers, p_layers = batch["q_layers"], batch["p_layers"]
        if layers is not None:
            q_layers, p_layers = q_layers[:, list(layers)], p_layers[:, list(layers)]
        return vector_scores(q_layers, batch["q_final"], p_layers, batch["p_final"], self.scale, gather_plain)


def build_cache(
    teacher: DualEncoder,
    folder: str | Path,
    queries: Sequence[str],
    passages: Sequence[str],
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherCache:
    """Compute a teacher's vectors of all layers, or take up where an interrupted run stopped.

    A finished cache of the same teacher and texts is given back as it is.

    Args:
        teacher: Is set to evaluation while this runs.
        folder: Made if missing.
        queries: Texts of queries.
        passages: Texts of passages.
        batch_size: Texts at a time.
        progress: Called with the number of texts that are done, and of all.

    Raises:
        InputError: The folder holds the cache of another teacher or of other texts, there is no text, or a
            vector is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys, places = _distinct(queries, passages)
    if not len(keys):
        raise InputError("expected at least one text", field="texts", value=0)
    head = {
        "version": _VERSION,
        "teacher": fingerprint(teacher),
        "texts": hashlib.blake2b(np.sort(keys).tobytes(), digest_size=16).hexdigest(),
        "items": len(keys),
        "scale": teacher.scale,
    }
    for name in (_HEAD, _PROGRESS):
        if (folder / name).exists():
            known = _read_json(folder / name)
            different = [key for key in head if known.get(key) != head[key]]
            if different:
                raise InputError(
                    f"holds the cache of other {' and '.join(different)}; name another folder or delete it",
                    file=folder,
                )
    if (folder / _HEAD).exists():
        return TeacherCache(folder)
    _fill(teacher, folder, lambda row: _item(queries, passages, places[row]), head, batch_size, progress)
    with atomic_path(folder / _KEYS) as temporary:
        np.save(temporary, keys)
    write_json(folder / _HEAD, head)
    (folder / _PROGRESS).unlink(missing_ok=True)
    return TeacherCache(folder)


@dataclass(frozen=True)
class _Item:
    """A text to embed."""

    kind: Kind
    text: str


def _distinct(queries: Sequence[str], passages: Sequence[str]) -> tuple[np.ndarray, Sequence[int]]:
    """Keys of the distinct texts and their places (passages after queries), long ones first: less padding."""
    keys = [text_key("query", text) for text in queries] + [text_key("passage", text) for text in passages]
    distinct, places = np.unique(np.array(keys, np.uint64), return_index=True)
    lengths = [len(_item(queries, passages, int(place)).text) for place in places]
    order = np.lexsort((-np.array(lengths), places >= len(queries)))
    return distinct[order], places[order].tolist()


def _item(queries: Sequence[str], passages: Sequence[str], place: int) -> _Item:
    if place < len(queries):
        return _Item("query", queries[place])
    return _Item("passage", passages[place - len(queries)])


def _fill(
    teacher: DualEncoder,
    folder: Path,
    items: Callable[[int], _Item],
    head: dict[str, Any],
    batch_size: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write the vectors; progress.json tells how far an interrupted run came."""
    total = head["items"]
    done = _read_json(folder / _PROGRESS)["done"] if (folder / _PROGRESS).exists() else 0
    arrays: list[np.memmap] = []
    was_training = teacher.training
    teacher.eval()
    try:
        for begin in range(done, total, batch_size):
            batch = [items(row) for row in range(begin, min(begin + batch_size, total))]
            for kind in ("query", "passage"):
                rows = [begin + number for number, item in enumerate(batch) if item.kind == kind]
                if not rows:
                    continue
                made = _embed(teacher, kind, [batch[row - begin].text for row in rows])
                arrays = arrays or [
                    np.lib.format.open_memmap(
                        folder / name,
                        mode="r+" if done else "w+",
                        dtype=np.float16,
                        shape=(total, *part.shape[1:]),
                    )
                    for name, part in zip((_LAYERS, _FINAL), made, strict=True)
                ]
                for array, part in zip(arrays, made, strict=True):
                    array[rows] = part
            reached = begin + len(batch)
            if (begin - done) // batch_size % 100 == 99 or reached == total:
                for array in arrays:
                    array.flush()
                write_json(folder / _PROGRESS, {**head, "done": reached})
            progress(reached, total)
    finally:
        teacher.train(was_training)


def _embed(teacher: DualEncoder, kind: Kind, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    task, length = (
        ("query", teacher.query_length) if kind == "query" else ("document", teacher.passage_length)
    )
    device = next(teacher.parameters()).device
    with torch.no_grad():
        vectors = teacher.vectors(to_device(tokens_of(teacher.model, texts, task, length), device))
    layers, final = (part.float().cpu().numpy() for part in vectors)
    if not max(np.abs(layers).max(), np.abs(final).max()) < np.finfo(np.float16).max:  # NaN too
        raise InputError("a vector is no number, or too large for float16", field="teacher")
    return layers, final


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError("there is no finished cache here", file=path.parent) from None
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error}", file=path) from error
    if not isinstance(found, dict):
        raise InputError("expected an object", file=path)
    return found
