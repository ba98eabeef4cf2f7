"""What LEAD's part of a step costs, a cached teacher, MaxSim, and search, beside what one would do instead.

Run `python packages/lead-kd/benchmarks/bench.py --out DIR`: prints a table of ratios, writes DIR/bench.json.
The teacher is all-MiniLM-L6-v2 and the student three of its layers. Peers run in the same process and take
turns; each figure is the median over turns of the process's CPU seconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from lead_kd.cache import CachedTeacher, build_cache
from lead_kd.jobs import LayerOptions, make_objective
from lead_kd.objectives import Candidates, Name, check_candidates, layers_of
from lead_kd.pruning import prune_layers
from lead_kd.scorers import DualEncoder, Scorer
from lead_kd.scores import maxsim
from lead_kd.search import search
from lead_kd.selection import LayerSchedule
from lead_kd.wikipedia_task import MODEL_FOLDER, MODEL_PACKAGE, wikipedia_task
from shared_core.bench import finish, in_turns, row
from shared_core.proof.environment import own_peak_bytes, reset_own_peak
from shared_core.wheels import member_folder


def medians(works: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    return np.median(in_turns(works, rounds, warm_up=1), axis=0).tolist()


def model() -> SentenceTransformer:
    return SentenceTransformer(str(member_folder(MODEL_PACKAGE, MODEL_FOLDER)), device="cpu")


class Step:
    """One training step of an objective, on the same texts each time."""

    def __init__(
        self, name: Name, teacher: Scorer | None, queries: list[str], passages: list[str], pairs: int = 2
    ) -> None:
        self.student = DualEncoder(prune_layers(model(), [0, 2, 4]), None, 16, 64)
        self.teacher = teacher
        self.queries, self.passages = queries, passages
        self.objective = make_objective(name, self.student, teacher, LayerOptions(), co_train=False, seed=0)
        parameters = [*self.student.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, 1e-5)
        own = torch.arange(len(passages)).view(len(queries), -1)
        self.on = Candidates(own[:, 0], torch.ones(len(queries), len(passages), dtype=torch.bool), own)
        depth = teacher.n_layers if teacher else 3
        self.pairs = LayerSchedule(depth, 3, pairs).pairs(0) if self.objective.needs_pairs else []

    def __call__(self) -> None:
        told, wanted = None, layers_of(self.pairs) if self.pairs else ([-1], [-1])
        scores = self.student(self.student.collate(self.queries, self.passages), [n % 3 for n in wanted[1]])
        on = self.on
        if self.teacher is not None:
            with torch.no_grad():
                batch = self.teacher.collate(self.queries, self.passages)
                told = self.teacher(batch, [n % self.teacher.n_layers for n in wanted[0]])
            scores, on = check_candidates(scores, told, on)
        self.objective(scores, told, on, self.pairs).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_rows(rounds: int) -> list[dict[str, Any]]:
    task = wikipedia_task(16, 1, 1, 0).train
    queries, passages = list(task.queries.values()), [text for text in task.corpus for _ in range(2)]
    teacher = DualEncoder(model().eval(), None, 16, 64)
    with tempfile.TemporaryDirectory() as folder:
        cache = CachedTeacher(build_cache(teacher, folder, queries, passages))
        works = [
            Step("lead", teacher, queries, passages),
            Step("response", teacher, queries, passages),
            Step("lead", cache, queries, passages),
            Step("none", None, queries, passages),
        ]
        lead, response, cached, none = medians(works, rounds)
    ours = version("lead-kd")
    return [
        row(
            "LEAD's step, K = 2 (target: at most 1.05 of response KD's)",
            lead,
            response,
            "response",
            ours,
            "s",
        ),
        row("LEAD's step, cached teacher (target: at most 1.1 of no KD's)", cached, none, "none", ours, "s"),
        row("LEAD's step, cached teacher", cached, lead, "LEAD with a running teacher", ours, "s"),
    ]


def memory_rows() -> list[dict[str, Any]]:
    """Peak memory of three steps beyond what is resident before them, each in a process of its own."""
    lead, response, none = (peak(name) for name in ("lead", "response", "none"))
    ours = version("lead-kd")
    what = "peak memory of LEAD's step, K = 2, running teacher"
    return [row(what, lead, response, "response", ours, "MB"), row(what, lead, none, "none", ours, "MB")]


def peak(name: str) -> float:
    command = [sys.executable, __file__, "--peak-of", name]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(found.splitlines()[-1]) / 1e6


def print_peak(name: Name) -> None:
    task = wikipedia_task(16, 1, 1, 0).train
    queries, passages = list(task.queries.values()), [text for text in task.corpus for _ in range(2)]
    teacher = None if name == "none" else DualEncoder(model().eval(), None, 16, 64)
    step = Step(name, teacher, queries, passages)
    step()  # libraries are loaded, optimizers have their state
    gc.collect()
    reset_own_peak()
    before = own_peak_bytes()
    for _ in range(3):
        step()
    print(own_peak_bytes() - before)


def bytes_row() -> dict[str, Any]:
    """What processes exchange a step, by shapes: pooled vectors here, states of all tokens as released."""
    queries, passages, layers, tokens, width = 8, 16, 12, 144, 768
    kept = passages * (5 + 1) * width * 4
    official = (passages * tokens + queries * 32) * layers * width * 4
    return row(
        "bytes gathered a process and step, 12 layers of 768, K = 5 (target: 100x fewer)", kept / 1e6,
        official / 1e6, "hidden states of all tokens and layers, as released", "0163380", "MB",
    )  # fmt: skip


def maxsim_row(rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(count, tokens, 128, generator=generator) for count, tokens in ((16, 32), (128, 144)))
    q_mask, p_mask = torch.ones(16, 32, dtype=torch.bool), torch.ones(128, 144, dtype=torch.bool)

    def loop() -> None:
        torch.stack([torch.stack([(a @ b.T).amax(1).sum() for b in p]) for a in q])

    ours, theirs = medians([lambda: maxsim(q, p, q_mask, p_mask), loop], rounds)
    return row(
        "MaxSim of 16 queries and 128 passages", ours, theirs, "a loop over pairs", torch.__version__, "s"
    )


def search_row(rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    q, p = (random.normal(size=(count, 384)).astype(np.float32) for count in (256, 200_000))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    ours, theirs = medians(
        [
            lambda: search(q, p, 100),
            lambda: semantic_search(torch.from_numpy(q), torch.from_numpy(p), top_k=100),
        ],
        rounds,
    )
    peer = version("sentence-transformers")
    return row(
        "search of 256 queries over 200,000 passages",
        256 / ours,
        256 / theirs,
        "semantic_search",
        peer,
        "queries/s",
    ) | {"ratio": theirs / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/lead-kd"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(arguments.peak_of)
        return
    rows = [
        *step_rows(arguments.rounds), *memory_rows(), bytes_row(), maxsim_row(arguments.rounds),
        search_row(min(arguments.rounds, 5)),
    ]  # fmt: skip
    finish("lead-kd", rows, arguments.out, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
