"""What the measures cost: beside the model's forward pass, pairwise loops, and the IsoScore package.

Run `python packages/isocse/benchmarks/bench.py --out DIR`: prints a table of ratios, writes DIR/bench.json.
Times are the process's own CPU seconds on one thread, which other work on the machine does not enter; peers
run in the same process and take turns. Models have random weights, which changes no cost.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from IsoScore.IsoScore import IsoScore
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from isocse import isotropy
from isocse.analysis import Options, analyze, choose_types
from isocse.corpus import Corpus
from isocse.encoders import Encoder, load_encoder
from isocse.geometry import Geometry, GeometrySettings
from isocse.streams import SelfSimilarity
from shared_core.files import write_json

WORDS = [f"w{n}" for n in range(4000)]


def row(what: str, ours: float, theirs: float, peer: str, peer_version: str, unit: str) -> dict[str, Any]:
    return {
        "what": what, "ours": ours, "theirs": theirs, "peer": peer, "peer_version": peer_version,
        "ratio": theirs / ours, "unit": unit,
    }  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: list[Callable[[], Any]], rounds: int) -> np.ndarray:
    """The least CPU seconds of each; every other round runs backwards."""
    times = np.zeros((rounds, len(works)))
    for number in range(rounds):
        order = range(len(works)) if number % 2 == 0 else reversed(range(len(works)))
        for n in order:
            times[number, n] = seconds(works[n])
    return times.min(0)


def encoder(size: int, layers: int) -> Encoder:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=size, num_hidden_layers=layers,
        num_attention_heads=size // 32, intermediate_size=4 * size,
    )  # fmt: skip
    return load_encoder(BertModel(config).eval(), fast)


def sentences(count: int) -> list[str]:
    """Sentences of 3 to 40 words, by a law like Zipf's."""
    generator = np.random.default_rng(0)
    shares = 1 / np.arange(1, len(WORDS) + 1)
    shares /= shares.sum()
    return [
        " ".join(generator.choice(WORDS, size=length, p=shares))
        for length in generator.integers(3, 41, count)
    ]


# (a) The whole suite beside the forward pass alone.


def suite_rows(count: int, rounds: int) -> Iterator[dict[str, Any]]:
    model = encoder(384, 6)
    texts = sentences(count)
    corpus = Corpus(model, texts)
    plan = choose_types(corpus, Options()).plan
    tokens = corpus.facts.ids

    def forward() -> None:
        with model.measuring():
            for batch in corpus.batches(plan):
                model.hidden_states(batch.ids, batch.mask)

    def padded() -> None:
        """In the order of the file, a batch as wide as its longest sentence."""
        with model.measuring():
            for start in range(0, len(texts), 64):
                batch = model.tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
                model.hidden_states(batch["input_ids"], batch["attention_mask"])

    times = in_turns([lambda: analyze(model, texts), forward, padded], rounds)
    what = f"tokens a second of the whole suite, MiniLM's shape, {count} sentences"
    peer = "the forward pass alone, tokens in hand"
    yield row(what, tokens / times[0], tokens / times[1], peer, version("transformers"), "tokens/s") | {
        "ratio": times[1] / times[0]
    }
    yield row("seconds of the forward pass, sorted by length", times[1], times[2], "in the file's order",
              version("transformers"), "s")  # fmt: skip


# (b) Against n x n matrices.


def pairwise_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Self-similarity and rogue dimensions of 400 types in 13 layers: sums against matrices of all pairs."""
    generator = np.random.default_rng(0)
    counts = np.minimum(5 + (2000 / np.arange(1, 401)).astype(int), 900)
    states = [torch.as_tensor(generator.normal(size=(n, 768)), dtype=torch.float32) for n in counts]
    flat = torch.cat(states)
    types = torch.as_tensor(np.repeat(np.arange(len(counts)), counts))
    found: dict[str, Any] = {}

    def ours() -> None:
        stream = SelfSimilarity(len(counts), 768)
        stream.update(flat / flat.norm(dim=1, keepdim=True), types)
        found["ours"] = stream.values().numpy()
        found["shares"] = [stream.contributions(kind).absolute for kind in range(len(counts))]

    def pairwise() -> None:
        values = []
        for x in states:
            units = x / x.norm(dim=1, keepdim=True)
            cosines = units @ units.T
            n = len(x)
            values.append(float((cosines.sum() - cosines.trace()) / (n * (n - 1))))
            for k in range(768):  # an n x n matrix of products a dimension
                torch.outer(units[:, k], units[:, k]).sum()
        found["theirs"] = np.array(values)

    times = in_turns([ours, pairwise], rounds)
    assert np.abs(found["ours"] - found["theirs"]).max() < 1e-5
    what = "self-similarity and contributions by dimension of 400 types, one layer of width 768"
    yield row(what, times[0], times[1], "n x n matrices of cosines and of products", version("torch"), "s")


# (c) IsoScore.


def isoscore_rows(points: int, rounds: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(0)
    x = torch.as_tensor(generator.normal(size=(points, 768)) * np.linspace(0.2, 1, 768))
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = isotropy.isoscore(x)

    def theirs() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["theirs"] = float(IsoScore(x))

    times = in_turns([ours, theirs], rounds)
    assert abs(found["ours"] - found["theirs"]) < 1e-6  # theirs has float32 constants
    what = f"IsoScore of {points} points in 768 dimensions, float64"
    yield row(what, times[0], times[1], "IsoScore", version("isoscore"), "s")


# (d) Memory.


def peak_of(count: int) -> int:
    """Greatest memory of NumPy and Python, and bytes of all sums, while a corpus from a file is measured."""
    model = encoder(64, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        path.write_text("\n".join(sentences(500) * (count // 500)))
        from isocse.corpus import SentenceFile

        tracemalloc.start()
        corpus = Corpus(model, SentenceFile(path))
        table = choose_types(corpus, Options())
        geometry = Geometry(len(table.names), GeometrySettings(detail=False))
        with model.measuring():
            for batch in corpus.batches(table.plan):
                geometry.update(model.hidden_states(batch.ids, batch.mask), batch, model.pool)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak + sum(_tensor_bytes(layer) for layer in geometry.measured)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_tensor_bytes(item) for item in vars(value).values()) if hasattr(value, "__dict__") else 0


def memory_rows() -> Iterator[dict[str, Any]]:
    import isocse.corpus

    isocse.corpus.KEPT_TOKENS = 0  # as for a corpus that is too large to keep
    small, large = (peak_of(count) / 2**20 for count in (10_000, 40_000))
    yield row("peak memory beside the model, 40,000 sentences", large, small, "10,000 sentences", "-", "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/isocse"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--points", type=int, default=100_000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for part in (
        pairwise_rows(1),
        isoscore_rows(arguments.points, arguments.rounds),
        suite_rows(arguments.sentences, arguments.rounds),
        memory_rows(),
    ):
        rows += part
    machine = f"{platform.machine()}, {os.cpu_count()} processors, {platform.system()}"
    write_json(arguments.out / "bench.json", {"package": "isocse", "machine": machine, "rows": rows})
    table = Table("what", "ours", "theirs", "unit", "peer", "ratio")
    for each in rows:
        numbers = (f"{each['ours']:.4g}", f"{each['theirs']:.4g}", each["unit"])
        table.add_row(each["what"], *numbers, each["peer"], f"{each['ratio']:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
