"""Vectors of a corpus in memory-mapped files: made shard by shard, resumed, and read block by block.

A folder holds vectors-00000-of-00004.npy and so on, beside ids.txt and embeddings.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from lead_kd.corpus import Corpus
from shared_core import InputError
from shared_core.files import write_json, write_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Precision = Literal["float32", "float16"]
_HEAD, _IDS = "embeddings.json", "ids.txt"
_BLOCK = 16_384


@dataclass(frozen=True)
class Embeddings:
    """Vectors of passages, memory-mapped.

    Attributes:
        ids: Id of each row.
        parts: Arrays (rows, dim), one a shard, in order.
    """

    ids: list[str]
    parts: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of at most `rows` rows as float32, each with the number of its first row."""
        start = 0
        for part in self.parts:
            for begin in range(0, len(part), rows):
                block = np.asarray(part[begin : begin + rows], np.float32)
                yield start + begin, block
            start += len(part)

    def rows(self, wanted: Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows dim"]:
        """Read rows, given in rising order, as float32."""
        ends = np.cumsum([len(part) for part in self.parts])
        found, begin = [], 0
        for part, end in zip(self.parts, ends, strict=True):
            inside = wanted[(wanted >= begin) & (wanted < end)] - begin
            found.append(np.asarray(part[inside], np.float32))
            begin = int(end)
        return np.concatenate(found)


def encode_corpus(
    model: SentenceTransformer,
    corpus: Corpus,
    folder: str | Path,
    *,
    shard: int = 0,
    shards: int = 1,
    batch_size: int = 64,
    max_length: int | None = None,
    precision: Precision = "float16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Encode a corpus, or one shard of it; a finished shard is left as it is, a begun one is gone on with.

    Args:
        model: Encodes passages, with its own prompt for documents.
        corpus: The passages.
        folder: Made if missing.
        shard: Which part, from 0; shards may be encoded by processes of their own.
        shards: Parts.
        batch_size: Texts at a time.
        max_length: Longest passage in tokens; the model's own limit where None.
        precision: Of the file; float16 halves it.
        progress: Called with the number of passages that are done, and of the shard.

    Returns:
        The shard's file.

    Raises:
        InputError: The folder holds vectors of another corpus, model or number of shards, or the shard is
            not there.
    """
    if not 0 <= shard < shards:
        raise InputError(f"expected 0 to {shards - 1}", field="shard", value=shard)
    if len(corpus) < shards:
        raise InputError(f"expected at least one passage for each of {shards} shards", value=len(corpus))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "passages": len(corpus),
        "corpus": corpus.fingerprint(),
        "model": model_fingerprint(model),
        "max_length": max_length,
        "precision": precision,
        "shards": shards,
    }
    _agree(folder / _HEAD, head)
    if not (folder / _IDS).exists():
        if wrong := next((name for name in corpus.ids if "\n" in name), None):
            raise InputError("expected an id of one line", field="id", value=wrong)
        write_text(folder / _IDS, "\n".join(corpus.ids) + "\n")
    write_json(folder / _HEAD, head)
    rows = _shard_rows(len(corpus), shard, shards)
    final = folder / f"vectors-{shard:05d}-of-{shards:05d}.npy"
    if not final.exists():
        _encode_shard(model, corpus, rows, final, batch_size, max_length, precision, progress)
    return final


def _encode_shard(
    model: SentenceTransformer,
    corpus: Corpus,
    rows: range,
    final: Path,
    batch_size: int,
    max_length: int | None,
    precision: Precision,
    progress: Callable[[int, int], None],
) -> None:
    begun, done_file = final.with_suffix(".begun.npy"), final.with_suffix(".begun.json")
    done = int(json.loads(done_file.read_text())["done"]) if done_file.exists() and begun.exists() else 0
    array: Any = None
    for start in range(done, len(rows), _BLOCK):
        texts = [corpus[row] for row in rows[start : start + _BLOCK]]
        made = _encode(model, texts, batch_size, max_length)
        if array is None:
            array = np.lib.format.open_memmap(
                begun, "r+" if done else "w+", np.dtype(precision), (len(rows), made.shape[1])
            )
        array[start : start + len(texts)] = made
        array.flush()
        write_json(done_file, {"done": start + len(texts)})
        progress(start + len(texts), len(rows))
    begun.replace(final)
    done_file.unlink(missing_ok=True)


def _encode(
    model: SentenceTransformer, texts: list[str], batch_size: int, max_length: int | None
) -> np.ndarray:
    before = model.max_seq_length
    if max_length is not None:
        model.max_seq_length = max_length
    try:
        made = model.encode_document(texts, batch_size=batch_size, show_progress_bar=False)
    finally:
        model.max_seq_length = before
    vectors = np.asarray(made, np.float32)
    if not np.isfinite(vectors).all():
        raise InputError("gives vectors that are no numbers", field="model")
    return vectors


def encode_queries(
    model: SentenceTransformer, queries: Sequence[str], batch_size: int = 64, max_length: int | None = None
) -> np.ndarray:
    """Encode queries with the model's own prompt for them: (queries, dim), float32."""
    before = model.max_seq_length
    if max_length is not None:
        model.max_seq_length = max_length
    try:
        return np.asarray(
            model.encode_query(list(queries), batch_size=batch_size, show_progress_bar=False), np.float32
        )
    finally:
        model.max_seq_length = before


def load_embeddings(folder: str | Path) -> Embeddings:
    """Open vectors that `encode_corpus` made, without reading them.

    Raises:
        InputError: A file or shard is missing, or its size does not fit.
    """
    folder = Path(folder)
    if not (folder / _HEAD).is_file():
        raise InputError("holds no embeddings; `lead-kd encode` makes them", file=folder)
    head = json.loads((folder / _HEAD).read_text())
    ids = (folder / _IDS).read_text().split("\n")[:-1]
    parts = []
    for shard in range(head["shards"]):
        file = folder / f"vectors-{shard:05d}-of-{head['shards']:05d}.npy"
        if not file.is_file():
            raise InputError(f"is missing: encode shard {shard} of {head['shards']}", file=file)
        part = np.load(file, mmap_mode="r")
        if len(part) != len(_shard_rows(len(ids), shard, head["shards"])):
            raise InputError("has another number of rows than ids.txt asks for", file=file, value=len(part))
        parts.append(part)
    return Embeddings(ids, parts)


def model_fingerprint(model: Any) -> str:
    """Return a hash of a model's weights and modules."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().float().numpy().tobytes())
    found.update(str(model).encode())
    return found.hexdigest()


def _shard_rows(count: int, shard: int, shards: int) -> range:
    return range(count * shard // shards, count * (shard + 1) // shards)


def _agree(path: Path, head: dict[str, Any]) -> None:
    if not path.exists():
        return
    known = json.loads(path.read_text())
    different = [name for name in head if known.get(name) != head[name]]
    if different:
        raise InputError(
            f"holds vectors of other {', '.join(different)}; name another folder", file=path.parent
        )
