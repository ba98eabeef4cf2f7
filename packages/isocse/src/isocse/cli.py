"""The command `isocse`: measure, compare, train, sweep, report, and prove the claim."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from shared_core import InputError, command, files
from shared_core.command import Device, ProofFolder, Quick, above_zero, folder_to_write, one_of

if TYPE_CHECKING:
    from isocse.report import GeometryReport
    from isocse.shift import ShiftReport
    from isocse.training import Recipe

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

POOLING_NAMES = ("cls", "mean", "max", "last")

app = typer.Typer(
    help="See what contrastive learning does to an embedding space.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (a claim does not hold) and 2 (bad input)."""
    command.run(app)


Model = Annotated[str, typer.Argument(help="Model folder, or a name that transformers knows.")]
Data = Annotated[Path, typer.Option(help="Text file, one sentence a line.", exists=True, dir_okay=False)]
Out = Annotated[Path, typer.Option(help="Folder for the results.", callback=folder_to_write)]
PoolingOption = Annotated[
    str | None,
    typer.Option(help="cls, mean, max, last; the model's own if not given.", callback=one_of(*POOLING_NAMES)),
]
Classes = Annotated[
    str,
    typer.Option(
        help="Which types are functional: stopwords, frequency, or pos:PIPELINE for a spaCy pipeline."
    ),
]
Unit = Annotated[str, typer.Option(help="token or word.", callback=one_of("token", "word"))]
Baseline = Annotated[
    str,
    typer.Option(
        help="What adjusted values are less of: expected, sampled or tokens.",
        callback=one_of("expected", "sampled", "tokens"),
    ),
]
Compat = Annotated[
    str | None,
    typer.Option(help="official: measure as the paper's published code.", callback=one_of("official")),
]
MinCount = Annotated[int, typer.Option(min=2, help="Fewest occurrences of an analysed type.")]
Sample = Annotated[int, typer.Option(min=4, help="Sentences of the samples.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the samples.")]
Special = Annotated[
    bool, typer.Option("--special/--no-special", help="Count [CLS], [SEP] in token measures.")
]
Treat = Annotated[
    list[str] | None,
    typer.Option("--treat", help="Measure again after remove-K, center or standardize; may be repeated."),
]
MaxLength = Annotated[int | None, typer.Option(min=3, help="Longest input in tokens.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Token positions of a batch.")]
Limit = Annotated[int | None, typer.Option(min=2, help="Only the first sentences.")]
PairsFile = Annotated[
    Path | None, typer.Option(help="Positive pairs for alignment (.csv, .tsv, .jsonl).", exists=True)
]


@app.callback()
def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@app.command()
def measure(
    model: Model,
    data: Data,
    out: Out,
    pairs: PairsFile = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="MODEL is a training run: measure each checkpoint in it.")
    ] = False,
    pooling: PoolingOption = None,
    classes: Classes = "stopwords",
    unit: Unit = "token",
    baseline: Baseline = "expected",
    compat: Compat = None,
    min_count: MinCount = 5,
    sample: Sample = 1000,
    seed: Seed = 0,
    special: Special = True,
    treat: Treat = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 2048,
    limit: Limit = None,
    device: Device = "auto",
) -> None:
    """Measure the geometry of a model on a text file: geometry.json, types.csv, a page and a picture."""
    sentences = _sentences(data, limit)
    options = _options(
        sentences, pooling, classes, unit, baseline, compat, min_count, sample, seed, special, treat,
        batch_tokens,
    )  # fmt: skip
    if checkpoints:
        _measure_checkpoints(Path(model), sentences, out, options, max_length, device)
        return
    from isocse import page

    aligned = None if pairs is None else _positive_pairs(pairs)
    report = _analyze(model, sentences, options, max_length, device, aligned)
    out.mkdir(parents=True, exist_ok=True)
    report.to_json(out / "geometry.json")
    _write_table(report.types_to_pandas(), out / "types.csv")
    files.write_text(out / "report.html", page.measure_page(report))
    report.plot(out / "layers.png")
    command.print_table(_layer_table(report))
    _say_notes(report)
    typer.echo(f"written: {out}/geometry.json, types.csv, report.html, layers.png")


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="Model folder, name, or a geometry.json.")],
    after: Annotated[str, typer.Argument(help="The same of the other one.")],
    out: Out,
    data: Annotated[
        Path | None,
        typer.Option(help="Text file; not needed for two geometry.json.", exists=True, dir_okay=False),
    ] = None,
    same_sense: Annotated[
        Path | None,
        typer.Option(
            help="Tab-separated word, sentence, sentence, where the word means the same.", exists=True
        ),
    ] = None,
    pooling: PoolingOption = None,
    classes: Classes = "stopwords",
    unit: Unit = "token",
    baseline: Baseline = "expected",
    compat: Compat = None,
    min_count: MinCount = 5,
    sample: Sample = 1000,
    seed: Seed = 0,
    special: Special = True,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = 2048,
    limit: Limit = None,
    device: Device = "auto",
) -> None:
    """Compare a model before and after training: a table, a page, and the types that moved."""
    saved = [place for place in (before, after) if place.endswith(".json")]
    if data is None and len(saved) < 2:
        raise InputError("is missing: models are measured on a text file", field="--data")
    sense = None if same_sense is None else _same_sense(same_sense)
    if sense is not None and saved:
        raise InputError("needs models, not saved reports", field="--same-sense")
    from isocse import page, shift
    from isocse.report import GeometryReport

    reports = []
    if data is not None:
        sentences = _sentences(data, limit)
        options = _options(
            sentences, pooling, classes, unit, baseline, compat, min_count, sample, seed, special, None,
            batch_tokens,
        )  # fmt: skip
    for place in (before, after):
        if place.endswith(".json"):
            reports.append(GeometryReport.from_json(place))
        else:
            reports.append(_analyze(place, sentences, options, max_length, device))  # pyright: ignore[reportPossiblyUnboundVariable]
    found = shift.compare_reports(*reports, seed=seed)
    if sense is not None:
        cosines = [float(shift.same_sense_cosines(place, sense).mean()) for place in (before, after)]
        found.same_sense = (
            cosines[0] - reports[0].last("anisotropy"),
            cosines[1] - reports[1].last("anisotropy"),
        )
    out.mkdir(parents=True, exist_ok=True)
    found.to_json(out / "shift.json")
    _write_table(found.to_pandas(), out / "types.csv")
    files.write_text(out / "report.html", page.compare_page(found))
    _print_shift(found)
    typer.echo(f"written: {out}/shift.json, types.csv, report.html")


Base = Annotated[str, typer.Option(help="Model folder or name to begin with.")]
TrainPairs = Annotated[
    Path,
    typer.Option(
        "--pairs",
        help="Pairs (.csv, .tsv, .jsonl), or a .txt with a sentence a line for unsupervised training.",
        exists=True,
        dir_okay=False,
    ),
]
Judged = Annotated[
    Path | None,
    typer.Option(
        help="Texts with human similarities: sentence1, sentence2, score; or sts-*.csv.", exists=True
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Updates; one epoch if not given.")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate.", callback=above_zero)]
TrainLength = Annotated[int, typer.Option(min=3, help="Tokens of a training text.")]
Freeze = Annotated[bool, typer.Option("--freeze-embeddings", help="Keep the embedding layer as it is.")]
Cut = Annotated[int | None, typer.Option(min=1, help="Train only so many of the lowest layers.")]
Checkpoint = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")]


@app.command()
def train(
    base: Base,
    pairs: TrainPairs,
    data: Data,
    out: Out,
    objective: Annotated[
        str, typer.Option(help="contrastive, or mlm as a control.", callback=one_of("contrastive", "mlm"))
    ] = "contrastive",
    temperature: Annotated[float, typer.Option(help="Of the objective.", callback=above_zero)] = 0.05,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs of a step.")] = 64,
    pooling: Annotated[
        str, typer.Option(help="cls, mean, max, last.", callback=one_of(*POOLING_NAMES))
    ] = "mean",
    steps: Steps = None,
    lr: Rate = 2e-5,
    max_length: TrainLength = 32,
    seed: Seed = 0,
    freeze_embeddings: Freeze = False,
    cut: Cut = None,
    judged: Judged = None,
    min_count: MinCount = 5,
    checkpoint_every: Checkpoint = None,
    limit: Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that OUT holds.")] = False,
    device: Device = "auto",
) -> None:
    """Train an encoder and measure its geometry at steps 0, 1, 2, 4, 8, ... on held-out sentences."""
    from isocse import page, sweep, training

    recipe = _recipe(
        objective=objective, temperature=temperature, batch_size=batch_size, pooling=pooling, steps=steps,
        learning_rate=lr, max_length=max_length, seed=seed, freeze_embeddings=freeze_embeddings, cut=cut,
        device=device,
    )  # fmt: skip
    found = training.train(
        base, _pairs(pairs), list(_sentences(data, limit)), recipe, out=out, judged=_judged(judged),
        checkpoint_every=checkpoint_every, resume=resume, progress=sys.stderr.isatty(), min_count=min_count,
    )  # fmt: skip
    runs = sweep.by_axis([sweep.Cell(recipe, found.history, found.losses)])
    files.write_text(
        out / "report.html", page.dynamics_page(runs, f"Training {recipe.name}", _facts(base, recipe))
    )
    command.print_table(_history_table(found.history))
    typer.echo(f"written: {out}/model, dynamics.jsonl, losses.json, report.html")


@app.command(name="sweep")
def sweep_command(
    base: Base,
    pairs: TrainPairs,
    data: Data,
    out: Out,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="May be repeated; the first is the centre.", callback=above_zero),
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=2, help="May be repeated.")] = None,
    pooling: Annotated[
        list[str] | None, typer.Option(help="May be repeated.", callback=one_of(*POOLING_NAMES))
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each setting.")] = 1,
    full: Annotated[
        bool, typer.Option("--full", help="All combinations; else one axis at a time leaves the centre.")
    ] = False,
    steps: Steps = None,
    lr: Rate = 2e-5,
    max_length: TrainLength = 32,
    freeze_embeddings: Freeze = False,
    cut: Cut = None,
    judged: Judged = None,
    min_count: MinCount = 5,
    checkpoint_every: Checkpoint = None,
    limit: Limit = None,
    device: Device = "auto",
) -> None:
    """Train over temperatures, batch sizes and poolings; the same command goes on where it stopped."""
    from isocse import sweep

    values = {
        "temperature": temperature or [0.05],
        "batch_size": batch_size or [64],
        "pooling": pooling or ["mean"],
    }
    centre = _recipe(
        **{name: given[0] for name, given in values.items()}, steps=steps, learning_rate=lr,
        max_length=max_length, freeze_embeddings=freeze_embeddings, cut=cut, device=device,
    )  # fmt: skip
    recipes = sweep.grid(centre, values, range(seeds), full=full)
    cells = sweep.sweep(
        base, _pairs(pairs), list(_sentences(data, limit)), recipes, out, judged=_judged(judged),
        checkpoint_every=checkpoint_every, min_count=min_count,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    _write_dynamics(cells, out, _facts(base, centre))


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="Results of measure, train or sweep.", exists=True, file_okay=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the folder if not given.")
    ] = None,
) -> None:
    """Make the page anew from results on disk."""
    from isocse import page, sweep
    from isocse.report import GeometryReport

    place = out or folder / "report.html"
    if (folder / "geometry.json").is_file():
        files.write_text(place, page.measure_page(GeometryReport.from_json(folder / "geometry.json")))
    else:
        cells = sweep.read_sweep(folder)
        _write_dynamics(cells, folder, _facts("", cells[0].recipe), place)
    typer.echo(f"written: {place}")


@app.command()
def prove(
    out: ProofFolder = Path("runs/isocse"),
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of each training run.")] = 3,
    quick: Quick = False,
) -> None:
    """Check the paper's findings on a real encoder, and on one that is tuned here."""
    from isocse import proof

    raise typer.Exit(proof.prove(out, seeds=seeds, quick=quick))


def _sentences(data: Path, limit: int | None) -> Any:
    from itertools import islice

    from isocse.corpus import SentenceFile

    found = SentenceFile(data)
    return found if limit is None else list(islice(found, limit))


def _options(
    sentences: Any,
    pooling: str | None,
    classes: str,
    unit: str,
    baseline: str,
    compat: str | None,
    min_count: int,
    sample: int,
    seed: int,
    special: bool,
    treat: list[str] | None,
    batch_tokens: int,
) -> dict[str, Any]:
    from isocse.options import make_options

    how: Any = classes
    if classes.startswith("pos:"):
        how = _by_part_of_speech(classes.removeprefix("pos:"), sentences)
    elif classes not in ("stopwords", "frequency"):
        raise InputError("expected stopwords, frequency or pos:PIPELINE", field="--classes", value=classes)
    options = {
        "pooling": pooling, "classes": how, "unit": unit, "baseline": baseline, "compat": compat,
        "min_count": min_count, "sample": sample, "seed": seed, "include_special": special,
        "treatments": treat or (), "batch_tokens": batch_tokens,
    }  # fmt: skip
    make_options(options)  # a wrong one is told before a model is loaded
    return options


def _by_part_of_speech(pipeline: str, sentences: Any) -> Any:
    from isocse.types import by_part_of_speech

    try:
        spacy = import_module("spacy")  # any release will do, so the choice of one is the user's
    except ModuleNotFoundError as error:
        raise InputError("is not installed: pip install spacy", field="spacy") from error
    try:
        nlp: Any = spacy.load(pipeline, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise InputError("spaCy has no such pipeline installed", field="--classes", value=pipeline) from error
    return by_part_of_speech(nlp, sentences)


def _analyze(
    model: str,
    sentences: Any,
    options: dict[str, Any],
    max_length: int | None,
    device: str,
    pairs: Any = None,
) -> GeometryReport:
    from isocse.analysis import analyze

    place = command.usable_device(device)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"measuring {model}", total=None)

        def progress(done: int, count: int) -> None:
            bar.update(task, completed=done, total=count)

        return analyze(
            model, sentences, pairs=pairs, device=place, max_length=max_length, progress=progress, **options
        )


def _measure_checkpoints(
    run: Path, sentences: Any, out: Path, options: dict[str, Any], max_length: int | None, device: str
) -> None:
    found = sorted(
        (place for place in run.glob("checkpoint-*") if place.is_dir()),
        key=lambda place: int(place.name.rpartition("-")[2]) if place.name[-1].isdigit() else -1,
    )
    if not found:
        raise InputError("holds no checkpoint-N folder", file=run)
    from isocse import page
    from isocse.dynamics import flat_measures

    rows = []
    out.mkdir(parents=True, exist_ok=True)
    for place in found:
        measured = _analyze(str(place), sentences, options, max_length, device)
        measured.to_json(out / f"{place.name}.json")
        rows.append({"step": int(place.name.rpartition("-")[2])} | flat_measures(measured))
    import json

    files.write_text(out / "dynamics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    runs = {"checkpoints": {run.name: [rows]}}
    files.write_text(out / "report.html", page.dynamics_page(runs, f"Checkpoints of {run.name}", str(run)))
    command.print_table(_history_table(rows))
    typer.echo(f"written: {out}/dynamics.jsonl, report.html, and a geometry of each checkpoint")


def _positive_pairs(path: Path) -> list[tuple[str, str]]:
    from isocse.pairs import load_pairs

    found = load_pairs(path)
    return list(zip(found.anchors, found.positives, strict=True))


def _pairs(path: Path) -> Any:
    from isocse.pairs import load_pairs

    return load_pairs(path)


def _judged(path: Path | None) -> Any:
    from isocse.pairs import load_judged

    return None if path is None else load_judged(path)


def _same_sense(path: Path) -> list[tuple[str, str, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) != 3:
            raise InputError(
                f"line {number}: expected word, sentence, sentence with tabs between", file=path,
                value=len(cells),
            )  # fmt: skip
        rows.append((cells[0], cells[1], cells[2]))
    return rows


def _recipe(**given: Any) -> Recipe:
    from isocse.training import Recipe

    return Recipe(**given)


def _facts(base: str, recipe: Recipe) -> str:
    steps = "one epoch" if recipe.steps is None else f"{recipe.steps} steps"
    begin = f"{base}: " if base else ""
    return (
        f"{begin}{recipe.objective}, {steps} of {recipe.batch_size}, learning rate {recipe.learning_rate:g}, "
        f"temperature {recipe.temperature:g}, pooling {recipe.pooling}, unless told otherwise."
    )


def _write_dynamics(cells: Any, folder: Path, facts: str, place: Path | None = None) -> None:
    from isocse import page, sweep

    runs = sweep.by_axis(cells)
    files.write_text(place or folder / "report.html", page.dynamics_page(runs, "Learning dynamics", facts))
    table = Table("run", "anisotropy", "intra-sentence, adjusted", "semantic", "functional", "norm", "loss")
    for cell in cells:
        last = cell.history[-1]
        cells_of_row = (
            _cell(last.get(name))
            for name in (
                "anisotropy", "adjusted_intra_sentence", "self_similarity_semantic",
                "self_similarity_functional", "norm",
            )
        )  # fmt: skip
        table.add_row(cell.recipe.name, *cells_of_row, _cell(cell.losses[-1] if cell.losses else None))
    command.print_table(table)


def _history_table(history: Any) -> Table:
    names = (
        "step", "anisotropy", "adjusted_intra_sentence", "self_similarity_semantic",
        "self_similarity_functional", "norm", "isoscore_sentences", "similarity_spearman",
    )  # fmt: skip
    table = Table(*(name.replace("_", " ") for name in names))
    for row in history:
        table.add_row(str(row["step"]), *(_cell(row.get(name)) for name in names[1:]))
    return table


def _layer_table(report: GeometryReport) -> Table:
    from isocse.report import MEASURES

    table = Table("measure", *(f"layer {layer}" for layer in report.layers), title=report.model)
    for name, values in report.measures.items():
        table.add_row(MEASURES[name].label, *(_cell(value) for value in values))
    return table


def _print_shift(found: ShiftReport) -> None:
    from isocse.shift import shift_rows

    table = Table("last layer", "before", "after", "change")
    for name, before, after, change in shift_rows(found):
        table.add_row(name, _cell(before), _cell(after), _cell(change, "+.3f"))
    command.print_table(table)
    test = found.adjusted
    typer.echo(
        f"adjusted self-similarity: semantic types {test.semantic:+.3f} "
        f"[{test.semantic_interval[0]:+.3f}, {test.semantic_interval[1]:+.3f}], functional types "
        f"{test.functional:+.3f} [{test.functional_interval[0]:+.3f}, {test.functional_interval[1]:+.3f}], "
        f"difference {test.difference:+.3f} (p {test.p:.4f}), at equal frequency "
        f"{test.matched_difference:+.3f} (p {test.matched_p:.4f})"
    )
    typer.echo("rose most: " + " ".join(token for token, _, _ in found.risers()))
    typer.echo("fell most: " + " ".join(token for token, _, _ in found.fallers()))
    if found.same_sense is not None:
        typer.echo(
            f"words of the same sense: {found.same_sense[0]:.3f} before, {found.same_sense[1]:.3f} after"
        )


def _say_notes(report: GeometryReport) -> None:
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)


def _write_table(frame: Any, path: Path) -> None:
    files.write_text(path, frame.to_csv(index=False))


def _cell(value: float | None, form: str = ".3f") -> str:
    return format(value, form) if value is not None and value == value else ""
