"""What the measures cost: beside the model's forward pass, pairwise loops, and the IsoScore package.

Run `python packages/isocse/benchmarks/bench.py --out DIR`: prints a table of ratios, writes DIR/bench.json.
Times are the process's own CPU seconds on one thread, which other work on the machine does not enter; peers
run in the same process and take turns. Models have random weights, which changes no cost.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from IsoScore.IsoScore import IsoScore
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from isocse import isotropy
from isocse.analysis import analyze, choose_types
from isocse.corpus import Corpus
from isocse.encoders import Encoder, load_encoder
from isocse.geometry import Geometry
from isocse.options import Options
from isocse.streams import SelfSimilarity
from isocse.types import CLASSES
from shared_core.bench import finish, in_turns, row

WORDS = [f"w{n}" for n in range(4000)]


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


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


# (a) The whole suite beside the forward pass.


def suite_rows(count: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Tokens a second of it all, then what each token costs, and what any corpus costs once."""
    model = encoder(384, 6)
    texts = sentences(count)
    corpus = Corpus(model, texts)
    table = choose_types(corpus, Options())
    tokens = corpus.facts.ids
    spent: dict[str, list[float]] = {"forward": [], "measure": [], "finish": []}

    def encode() -> None:
        """The states of all layers, in the same batches, from texts."""
        fresh = Corpus(model, texts)
        with model.measuring():
            for batch in fresh.batches(table.plan):
                model.hidden_states(batch.ids, batch.mask)

    def padded() -> None:
        """In the order of the file, a batch as wide as its longest sentence."""
        with model.measuring():
            for start in range(0, len(texts), 64):
                batch = model.tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
                model.hidden_states(batch["input_ids"], batch["attention_mask"])

    def by_part() -> None:
        geometry, times = Geometry(len(table.names)), {"forward": 0.0, "measure": 0.0}
        with model.measuring():
            for batch in corpus.batches(table.plan):
                start = time.process_time()
                states = model.hidden_states(batch.ids, batch.mask)
                middle = time.process_time()
                geometry.update(states, batch, "mean")
                times["forward"] += middle - start
                times["measure"] += time.process_time() - middle
        analysed = table.classes != CLASSES.index("special")
        times["finish"] = seconds(lambda: geometry.results(analysed, table.classes))
        for name, value in times.items():
            spent[name].append(value)

    times = in_turns([lambda: analyze(model, texts), encode, padded, by_part], rounds).min(0)
    least = {name: min(values) for name, values in spent.items()}
    peer = version("transformers")
    yield row(f"tokens a second of the whole suite, MiniLM's shape, {count} sentences", tokens / times[0],
              tokens / times[1], "the states of all layers alone, from texts", peer, "tokens/s") | {
        "ratio": times[1] / times[0]
    }  # fmt: skip
    yield row("measuring what a forward pass gave, all layers", least["measure"], least["forward"],
              "the forward pass", peer, "s")  # fmt: skip
    yield row("the end: pairs, eigenvectors and errors of samples of 1,000, for any corpus", least["finish"],
              least["forward"], "the forward pass", peer, "s")  # fmt: skip
    yield row("states of all layers, sorted by length", times[1], times[2], "in the file's order", peer, "s")


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

    times = in_turns([ours, pairwise], rounds).min(0)
    assert np.abs(found["ours"] - found["theirs"]).max() < 1e-5
    what = "self-similarity and contributions by dimension of 400 types, one layer of width 768"
    yield row(what, times[0], times[1], "n x n matrices of cosines and of products", version("torch"), "s")


# (c) IsoScore.


def isoscore_rows(points: int, rounds: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(0)
    x = torch.as_tensor(generator.normal(size=(points, 768)) * np.linspace(0.2, 1, 768))
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = isotropy.isoscore(x, warn=False)

    def theirs() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["theirs"] = float(IsoScore(x))

    times = in_turns([ours, theirs], rounds).min(0)
    assert abs(found["ours"] - found["theirs"]) < 1e-6  # theirs has float32 constants
    what = f"IsoScore of {points} points in 768 dimensions, float64"
    yield row(what, times[0], times[1], "IsoScore", version("isoscore"), "s")


# (d) Memory.

PEAK = """
import pathlib, resource, sys
sys.path.insert(0, {folder!r})
import bench, torch
from isocse import SentenceFile, analyze
torch.set_num_threads(1)
analyze(bench.encoder(64, 2), SentenceFile({path!r}))
status = pathlib.Path("/proc/self/status")  # on Linux getrusage may tell the peak of the parent
lines = status.read_text().splitlines() if status.is_file() else []
own = [line.split()[1] for line in lines if line.startswith("VmHWM")]
print(*own or [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])
"""


def peak_of(count: int) -> float:
    """Greatest resident MiB of a process of its own that measures a file of so many sentences."""
    some = sentences(1000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines("\n".join(some) + "\n" for _ in range(count // len(some)))
        code = PEAK.format(folder=str(Path(__file__).parent), path=str(path))
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                              check=True)  # fmt: skip
    kib = int(done.stdout.split()[-1])
    return kib / (2**20 if sys.platform == "darwin" else 2**10)


def memory_rows(sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    peaks = [peak_of(count) for count in sizes]
    for count, peak in zip(sizes[1:], peaks[1:], strict=True):
        what = f"peak memory of the process, {count:,} sentences"
        yield row(what, peak, peaks[0], f"{sizes[0]:,} sentences", "-", "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/isocse"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--points", type=int, nargs="+", default=[4000, 100_000])
    parser.add_argument("--memory", type=int, nargs="+", default=[10_000, 40_000, 160_000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for part in (
        pairwise_rows(1),
        *(isoscore_rows(points, arguments.rounds) for points in arguments.points),
        suite_rows(arguments.sentences, arguments.rounds),
        memory_rows(arguments.memory),
    ):
        rows += part
    finish("isocse", rows, arguments.out, threads=1)


if __name__ == "__main__":
    main()
