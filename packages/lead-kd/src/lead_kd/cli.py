"""The command `lead-kd`: mine, train, encode, search, evaluate and prove."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from shared_core import InputError, command, files
from shared_core.command import Device, ProofFolder, Quick, Seeds, above_zero, file_to_write, folder_to_write

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

app = typer.Typer(
    help="LEAD: a small retriever that learned how a large one reads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (the claim does not hold) and 2 (bad input)."""
    command.run(app)


class Objective(StrEnum):
    """What is minimized."""

    LEAD = "lead"
    NONE = "none"
    RESPONSE = "response"
    MARGIN_MSE = "margin-mse"
    LISTWISE = "listwise"
    REGRESSION = "regression"
    EMBEDDING = "embedding"
    MINILM = "minilm"


class TeacherKind(StrEnum):
    """What the teacher is."""

    AUTO = "auto"
    DUAL = "dual"
    COLBERT = "colbert"
    CROSS = "cross"


class Layout(StrEnum):
    """How the data lie in their folder."""

    AUTO = "auto"
    BEIR = "beir"
    MSMARCO = "msmarco"
    MSMARCO_DOC = "msmarco-doc"
    DPR = "dpr"


class Choice(StrEnum):
    """How layers are paired."""

    RANDOM = "random"
    LAST = "last"
    SKIP = "skip"


class Precision(StrEnum):
    """Of embeddings on disk."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Mixed(StrEnum):
    """Mixed precision in training."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"


Data = Annotated[Path, typer.Option(help="Folder with corpus, queries and judgements.")]
Format = Annotated[Layout, typer.Option("--format", help="Layout of the folder.")]
Split = Annotated[str, typer.Option(help="train, dev, test, ...")]
SkipMissing = Annotated[
    bool,
    typer.Option("--skip-missing", help="Leave judgements of missing passages out, in place of failing."),
]
QueryLength = Annotated[
    int | None, typer.Option(min=4, help="Longest query in tokens; the model's own limit.")
]
PassageLength = Annotated[int | None, typer.Option(min=4, help="Longest passage in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts at a time.")]
Depth = Annotated[int, typer.Option("--k", min=1, help="Passages a query.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]


@contextmanager
def _bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr; gives a function of what is done and of all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(words, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _load(data: Path, split: str, layout: Layout, skip_missing: bool) -> Any:
    from lead_kd.readers import load_data

    found = load_data(data, split, layout.value, "skip" if skip_missing else "error")
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    return found


@app.command()
def mine(
    data: Data,
    out: Annotated[Path, typer.Option(help="File for the negatives (.jsonl).", callback=file_to_write())],
    model: Annotated[
        str | None, typer.Option(help="Retriever whose mistakes are taken; BM25 if not given.")
    ] = None,
    split: Split = "train",
    format: Format = Layout.AUTO,
    count: Annotated[int, typer.Option(min=1, help="Negatives a query, at most.")] = 100,
    skip: Annotated[int, typer.Option(min=0, help="Passages from the top that are passed over.")] = 0,
    embeddings: Annotated[
        Path | None, typer.Option(help="Folder that `encode` made; else they are made beside OUT.")
    ] = None,
    query_length: QueryLength = None,
    passage_length: PassageLength = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    skip_missing: SkipMissing = False,
) -> None:
    """Find hard negatives: passages that a retriever puts first and that are not relevant."""
    with command.warnings_in_one_line():
        found = _load(data, split, format, skip_missing)
        from lead_kd import mining
        from lead_kd.search import search as exact

        queries = list(found.judged())
        texts = [found.queries[query] for query in queries]
        most = max((len(found.positives(query)) for query in queries), default=0)
        wanted = min(count + skip + most, len(found.corpus))
        if model is None:
            ranked = mining.bm25(found.corpus, texts, wanted)
        else:
            from lead_kd.embeddings import encode_corpus, encode_queries, load_embeddings
            from lead_kd.jobs import load_dual_encoder

            where = command.usable_device(device)
            encoder = load_dual_encoder(model, where)
            folder = embeddings or out.with_suffix(".embeddings")
            if embeddings is None:
                with _bar("encoding") as progress:
                    encode_corpus(
                        encoder, found.corpus, folder, batch_size=batch_size, max_length=passage_length,
                        progress=progress,
                    )  # fmt: skip
            vectors = load_embeddings(folder)
            _same_model(folder, encoder, model)
            if vectors.ids != found.corpus.ids:
                raise InputError("holds vectors of another corpus", file=folder)
            ranked = exact(
                encode_queries(encoder, texts, batch_size, query_length), vectors, wanted, device=where
            )
        negatives = mining.hard_negatives(found, queries, ranked, found.corpus.ids, count, skip)
        mining.write_negatives(out, negatives)
        mean = sum(map(len, negatives.values())) / max(len(negatives), 1)
        typer.echo(f"written: {out}, {len(negatives)} queries, {mean:.1f} negatives each")


@app.command()
def train(
    data: Data,
    student: Annotated[
        str, typer.Option(help="Student: a sentence-transformers or transformers folder or name.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for student, checkpoint and history.", callback=folder_to_write)
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Teacher; may be left out for --objective none.")
    ] = None,
    teacher_kind: Annotated[
        TeacherKind, typer.Option(help="auto reads it from the teacher's folder.")
    ] = TeacherKind.AUTO,
    keep_layers: Annotated[
        str | None, typer.Option(help="Layers of the student that stay, from 0: 1,3,5.")
    ] = None,
    negatives: Annotated[Path | None, typer.Option(help="Hard negatives from `mine`, or triples.")] = None,
    split: Split = "train",
    format: Format = Layout.AUTO,
    objective: Annotated[Objective, typer.Option(help="LEAD, or a rival.")] = Objective.LEAD,
    co_train: Annotated[
        bool, typer.Option("--co-train", help="Train the teacher too, as published.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for a frozen dual encoder's vectors, made once.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 50_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries a step and process.")] = 32,
    negatives_per_query: Annotated[int, typer.Option(min=0, help="Hard negatives a query.")] = 1,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the student.")] = 5e-5,
    teacher_lr: Annotated[
        float | None, typer.Option(help="Of the teacher, with --co-train; the student's.")
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.1,
    accumulate: Annotated[int, typer.Option(min=1, help="Groups whose gradients make one step.")] = 1,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Pairs of layers; 5, or as many as there are.")
    ] = None,
    strategy: Annotated[Choice, typer.Option(help="How layers are paired.")] = Choice.RANDOM,
    redraw_every: Annotated[int, typer.Option(min=1, help="Steps between draws of pairs.")] = 10,
    layer_temperature: Annotated[
        float | None, typer.Option(help="Of layers' weights; 1 on cosines, else 10.", callback=above_zero)
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the distributions that are aligned.", callback=above_zero)
    ] = 1.0,
    query_length: QueryLength = 32,
    passage_length: PassageLength = 256,
    dev_split: Annotated[
        str | None, typer.Option(help="Evaluate on this split and keep the best student.")
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations.")] = None,
    dev_passages: Annotated[
        int, typer.Option(min=1, help="Passages that are searched in an evaluation.")
    ] = 20_000,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between records of the history.")] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Processes that tokenize; 0 for none.")] = 0,
    mixed_precision: Annotated[Mixed, typer.Option(help="fp16 or bf16 on a GPU.")] = Mixed.NO,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT, where there is one.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    skip_missing: SkipMissing = False,
) -> None:
    """Distill a teacher into a student. Several processes: `accelerate launch -m lead_kd train ...`."""
    kept = _layers(keep_layers)
    if teacher is None and objective != Objective.NONE:
        raise InputError(f"--objective {objective.value} needs one", field="--teacher")
    if co_train and objective not in (Objective.LEAD, Objective.RESPONSE):
        raise InputError(f"--objective {objective.value} only reads the teacher", field="--co-train")
    if cache is not None and (co_train or objective == Objective.MINILM):
        raise InputError("a teacher in a cache neither trains nor runs", field="--cache", value=str(cache))
    with command.warnings_in_one_line():
        found = _load(data, split, format, skip_missing)
        if negatives is not None:
            from lead_kd.readers import read_negatives, with_negatives

            found = with_negatives(found, read_negatives(negatives), negatives)
        from accelerate import Accelerator, DistributedDataParallelKwargs

        from lead_kd import jobs
        from lead_kd.scorers import DualEncoder
        from lead_kd.training import Recipe

        where = command.usable_device(device)
        with command.accelerate_device(where):
            accelerator = Accelerator(
                cpu=where == "cpu",
                mixed_precision=mixed_precision.value,
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            )
        where = str(accelerator.device)
        small = DualEncoder(jobs.load_student(student, where, kept), None, query_length, passage_length)
        large = None
        if teacher is not None:
            large = jobs.load_teacher(teacher, where, teacher_kind.value, query_length, passage_length)
            if cache is not None:
                with accelerator.main_process_first(), _bar("caching the teacher") as progress:
                    large = jobs.cached(large, cache, found, negatives_per_query, progress)
        recipe = Recipe(
            steps, lr, teacher_lr, warmup, accumulate=accumulate, log_every=log_every,
            checkpoint_every=checkpoint_every, evaluate_every=evaluate_every, workers=workers, seed=seed,
        )  # fmt: skip
        options = jobs.LayerOptions(pairs, strategy.value, redraw_every, layer_temperature, temperature)
        dev = None
        if dev_split is not None:
            dev = jobs.dev_set(_load(data, dev_split, format, skip_missing), dev_passages)
        if accelerator.is_main_process:
            asked = [found.queries[query] for query in found.judged()]
            for texts, task, length in (
                (asked, "query", query_length),
                (found.corpus, "document", passage_length),
            ):
                _tell_cut(small.model, texts, task, length)
        about = {"student": student, "teacher": teacher, "keep": kept, "objective name": objective.value}
        with _bar("training") as progress:
            trained = jobs.train(
                small, large, found, out, objective=objective.value, options=options, recipe=recipe,
                batch_size=batch_size, negatives=negatives_per_query, co_train=co_train, resume=resume,
                dev=dev, accelerator=accelerator, about=about, on_step=lambda done, _: progress(done, steps),
            )  # fmt: skip
        if accelerator.is_main_process:
            _tell(trained, out)


def _tell(trained: Any, out: Path) -> None:
    last = trained.history[-1] if trained.history else {}
    words = ", ".join(f"{name} {last[name]:.4f}" for name in ("loss", "stu", "rep", "lyr") if name in last)
    typer.echo(f"step {last.get('step', 0)}: {words}")
    for step, values in trained.evaluations.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        typer.echo(f"dev, step {step}: {shown}")
    if trained.masked:
        typer.echo(f"masked: {trained.masked} candidates, copies or other positives of the same query")
    typer.echo(f"written: {out / 'student'}")


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("expected numbers like 1,3,5", field="--keep-layers", value=text) from None


@app.command()
def encode(
    data: Data,
    model: Annotated[str, typer.Option(help="The retriever.")],
    out: Annotated[Path, typer.Option(help="Folder for the vectors.", callback=folder_to_write)],
    format: Format = Layout.AUTO,
    shard: Annotated[int, typer.Option(min=0, help="Which part to encode, from 0.")] = 0,
    shards: Annotated[
        int, typer.Option(min=1, help="Parts, which may be encoded by different machines.")
    ] = 1,
    passage_length: PassageLength = 256,
    precision: Annotated[Precision, typer.Option(help="Of the files.")] = Precision.FLOAT16,
    batch_size: BatchSize = 64,
    device: Device = "auto",
) -> None:
    """Encode a corpus into memory-mapped files; begun ones are gone on with."""
    with command.warnings_in_one_line():
        from lead_kd.readers import load_corpus

        corpus = load_corpus(data, format.value)
        from lead_kd.embeddings import encode_corpus
        from lead_kd.jobs import load_dual_encoder

        encoder = load_dual_encoder(model, command.usable_device(device))
        _tell_cut(encoder, corpus, "document", passage_length)
        with _bar(f"encoding shard {shard} of {shards}") as progress:
            file = encode_corpus(
                encoder, corpus, out, shard=shard, shards=shards, batch_size=batch_size,
                max_length=passage_length, precision=precision.value, progress=progress,
            )  # fmt: skip
        typer.echo(f"written: {file}")


@app.command()
def search(
    model: Annotated[str, typer.Option(help="The retriever that made the vectors; encodes the queries.")],
    embeddings: Annotated[Path, typer.Option(help="Folder that `encode` made.")],
    out: Annotated[
        Path, typer.Option(help="File for the run, as trec_eval reads it.", callback=file_to_write())
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of data: its queries with judgements.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Any queries, in place of --data: queries.jsonl, or id, tab, text.")
    ] = None,
    split: Split = "test",
    format: Format = Layout.AUTO,
    k: Depth = 1000,
    faiss: Annotated[
        str | None, typer.Option(help="A faiss index in place of exact search: Flat, IVF4096,Flat, ...")
    ] = None,
    nprobe: Annotated[
        int | None, typer.Option(min=1, help="Lists of an IVF index that are searched; faiss' own 1.")
    ] = None,
    query_length: QueryLength = 32,
    batch_size: BatchSize = 64,
    block: Annotated[int, typer.Option(min=1, help="Passages at a time.")] = 65_536,
    device: Device = "auto",
    skip_missing: SkipMissing = False,
) -> None:
    """Search the queries of a split or a file, exactly or by faiss, and write a run."""
    if (data is None) == (queries is None):
        raise InputError("expected one of --data and --queries", field="--queries", value=str(queries))
    if nprobe is not None and faiss is None:
        raise InputError("is for --faiss alone", field="--nprobe", value=nprobe)
    with command.warnings_in_one_line():
        from lead_kd.readers import read_queries

        if queries is not None:
            asked = read_queries(queries)
        else:
            found = _load(cast(Path, data), split, format, skip_missing)
            asked = {query: found.queries[query] for query in found.judged()}
        from lead_kd.embeddings import encode_queries, load_embeddings
        from lead_kd.jobs import load_dual_encoder
        from lead_kd.search import search as exact
        from lead_kd.search import search_faiss, write_run

        vectors = load_embeddings(embeddings)
        where = command.usable_device(device)
        encoder = load_dual_encoder(model, where)
        _same_model(embeddings, encoder, model)
        of_queries = encode_queries(encoder, list(asked.values()), batch_size, query_length)
        ranked = (
            exact(of_queries, vectors, k, block=block, device=where)
            if faiss is None
            else search_faiss(of_queries, vectors, k, faiss, block, nprobe)
        )
        tag = "-".join(Path(model).name.split()) or "lead-kd"
        write_run(out, ranked.as_run(list(asked), vectors.ids), tag)
        typer.echo(f"written: {out}, {len(asked)} queries")


def _tell_cut(encoder: Any, texts: Sequence[str], task: str, length: int | None) -> None:
    """Say how many of the first texts are longer than the model is let to read."""
    from lead_kd.scorers import count_cut

    sample = [texts[row] for row in range(min(len(texts), 1000))]
    limit = length or encoder.max_seq_length
    if limit and (cut := count_cut(encoder, sample, task, limit)):
        kind = {"document": "passages", "query": "queries"}[task]
        typer.echo(f"note: {cut} of the first {len(sample)} {kind} are cut at {limit} tokens.", err=True)


def _same_model(folder: Path, encoder: Any, name: str) -> None:
    import json

    from lead_kd.embeddings import model_fingerprint

    if json.loads((folder / "embeddings.json").read_text())["model"] != model_fingerprint(encoder):
        raise InputError(f"holds vectors of another model than {name}", file=folder)


@app.command()
def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(help="Run files; the first is what the others are compared with.")
    ],
    qrels: Annotated[Path, typer.Option(help="Judgements: BEIR's or TREC's.")],
    measure: Annotated[
        list[str] | None, typer.Option(help="ir-measures' names; RR@10, nDCG@10, R@100, AP@1000.")
    ] = None,
    rel: Annotated[
        int, typer.Option(min=1, help="Least grade that is relevant; 2 for TREC DL passages.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="File for every query's values and the tests (.json).", callback=file_to_write()),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure runs, and compare them query by query by a paired randomization test."""
    from rich.table import Table

    from lead_kd import evaluation
    from lead_kd.readers import read_qrels
    from lead_kd.search import read_run

    names = measure or list(evaluation.DEFAULT)
    if twice := {str(path) for path in runs if runs.count(path) > 1}:
        raise InputError("is given twice", file=sorted(twice)[0])
    judged = read_qrels(qrels)
    found = {str(path): evaluation.measure(judged, read_run(path), names, rel) for path in runs}
    table = Table("run", *names, title=f"{qrels}, grade {rel} or more is relevant")
    first = next(iter(found))
    record: dict[str, Any] = {"qrels": str(qrels), "rel": rel, "runs": {}}
    for path, values in found.items():
        cells, tests = [], {}
        for name in names:
            cell = f"{values.mean[name]:.4f}"
            if path != first:
                test = evaluation.compare(found[first].per_query[name], values.per_query[name], seed=seed)
                tests[name] = vars(test)
                cell += f" ({test.difference:+.4f}, p {test.p_value:.3f})"
            cells.append(cell)
        table.add_row(path, *cells)
        record["runs"][path] = {"mean": values.mean, "per_query": values.per_query, "against_first": tests}
    command.print_table(table)
    if out is not None:
        files.write_json(out, record)
        typer.echo(f"written: {out}")


@app.command()
def prove(
    out: ProofFolder = Path("runs/lead-kd"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> int:
    """Distill MiniLM into its first layers on Wikipedia's texts, by LEAD and by its rivals."""
    from lead_kd.proof import run_proof

    with command.warnings_in_one_line():
        return run_proof(out, range(seeds), quick)
