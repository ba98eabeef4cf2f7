"""The command `rlogist`, one function a subcommand, which imports what it needs when it runs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlogist.cli_options import Backend, EncoderOptions, FolderOptions, SlideOptions, with_options
from shared_core.command import (
    BAD_INPUT,
    Device,
    ProofFolder,
    Quick,
    Seeds,
    file_to_write,
    folder_to_write,
    run,
)
from shared_core.files import check_no_run, make_folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reads whole-slide images by looking at few regions in depth (RLogist).",
)

# Torch, OpenSlide and all that needs them are imported inside the commands: help answers at once.

Slides = Annotated[Path, typer.Argument(help="a slide, or a folder of slides (searched to any depth)")]
Out = Annotated[Path, typer.Option(help="folder for results", callback=folder_to_write)]


def main() -> None:
    """Run the command, with the exit codes 0, 1 (a claim does not hold) and 2 (bad input, a slide failed)."""
    run(app)


@app.command()
@with_options
def segment(slides: Slides, out: Out, opened: SlideOptions, folder: FolderOptions) -> int:
    """Find tissue and lay the region grid; writes a picture, JSON, and GeoJSON for QuPath for each slide."""
    from rlogist.slide_jobs import Job, segment_slide

    opening = opened.opening()
    return _run_folder(segment_slide, slides, out, lambda path, to: Job(path, to, opening), folder)


@app.command()
@with_options
def extract(
    slides: Slides,
    out: Out,
    encoder: EncoderOptions,
    opened: SlideOptions,
    folder: FolderOptions,
    extractor: Annotated[
        str, typer.Option(help="resnet50, stain, timm/NAME, hf/NAME-OR-FOLDER or module:callable")
    ] = "resnet50",
    deep: Annotated[
        bool, typer.Option("--deep/--scan-only", help="read every region at depth too, for training")
    ] = False,
) -> int:
    """Extract features to HDF5, one file a slide; run again to go on where it was interrupted."""
    from rlogist.slide_jobs import Job, extract_slide

    encoding = encoder.encoding(extractor, deep, folder.here)
    if folder.here:
        encoding.load()  # what is wrong with the extractor is wrong for every slide: said once, before work
    opening = opened.opening()
    return _run_folder(
        extract_slide, slides, out, lambda path, to: Job(path, to, opening, encoding), folder, encoding.gpus
    )


@app.command("labels")
def label_table(
    root: Annotated[Path, typer.Argument(help="folder of CAMELYON16 or TCGA", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="the .csv file", callback=file_to_write())],
) -> None:
    """Write the label table of CAMELYON16 or of a TCGA download: slide, label, patient, official split."""
    from collections import Counter

    from rlogist.layouts import public_layout, write_labels

    records = public_layout(root)
    write_labels(out, records, root)
    counts = Counter(f"{record.split} {record.label}" if record.split else record.label for record in records)
    shown = ", ".join(
        f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda own: str(own[0]))
    )
    typer.echo(f"{len(records)} slides ({shown}): {out}")


@app.command("demo-slides")
def demo_slides(
    out: Out,
    slides: Annotated[int, typer.Option(min=1, help="how many")] = 60,
    slides_per_patient: Annotated[int, typer.Option(min=1, help="slides of one patient")] = 2,
    size: Annotated[int, typer.Option(min=1024, help="side of a slide in pixels, a multiple of 256")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="which slides")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Generate slides of real H&E texture whose lesions only a deep look tells apart, with labels."""
    from rlogist.demo_slides import DemoWorld, make_demo_slides
    from rlogist.progress import counting

    world = DemoWorld(size=size, group_radius=min(DemoWorld.group_radius, size / 8))  # four have room
    with counting("slides") as report:
        made = make_demo_slides(out, slides, slides_per_patient, seed, world, jobs, report)
    positive = sum(slide.label for slide in made)
    typer.echo(
        f"{len(made)} slides ({positive} positive) in {out / 'slides'}, labels in {out / 'labels.csv'}"
    )


class UpdateOption(StrEnum):
    """What a look does to other regions."""

    GLOBAL = "global"
    TARGETED = "targeted"
    NONE = "none"


class RewardOption(StrEnum):
    """What reinforcement learning is rewarded for."""

    DELTA_CE = "delta_ce"
    NEG_CE = "neg_ce"
    TERMINAL = "terminal"


class StrategyOption(StrEnum):
    """How regions are chosen."""

    POLICY = "policy"
    RANDOM = "random"
    GREEDY_STATIC = "greedy-static"
    GREEDY_ADAPTIVE = "greedy-adaptive"
    EXHAUSTIVE = "exhaustive"


Model = Annotated[Path, typer.Option(help="folder that `rlogist train` wrote", exists=True, file_okay=False)]
Labels = Annotated[
    Path, typer.Option(help="CSV with WSI_path,label and, if you like, patient,split", dir_okay=False)
]
Rho = Annotated[float | None, typer.Option(help="share of regions to look at; the trained one by default")]


@app.command()
def train(
    features: Annotated[Path, typer.Argument(help="folder of `rlogist extract --deep`", file_okay=False)],
    labels: Labels,
    out: Out,
    rho: Annotated[float, typer.Option(help="share of regions to look at")] = 0.1,
    update: Annotated[UpdateOption, typer.Option(help="targeted is SASHA's")] = UpdateOption.GLOBAL,
    reward: Annotated[RewardOption, typer.Option(help="terminal is the paper's")] = RewardOption.DELTA_CE,
    epochs: Annotated[int, typer.Option(min=1, help="of stage A, at most")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="slides a step of stages A to B2")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="looks of stage C in all")] = 500_000,
    envs: Annotated[int, typer.Option(min=1, help="readings side by side in stage C")] = 4,
    width: Annotated[int, typer.Option(min=1, help="of the classifier")] = 512,
    whiten: Annotated[
        float, typer.Option(min=0, help="decorrelate features; 0.01 suits the stain extractor")
    ] = 0.0,
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="share of patients, where the table has no split")
    ] = 0.2,
    joint_every: Annotated[int, typer.Option(min=0, help="updates between steps of the classifier")] = 0,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of all randomness")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in OUT, where there is one")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="scalars to OUT/tensorboard")] = False,
) -> None:
    """Train all stages on feature files; writes a checkpoint after each epoch and the model at the end."""
    from rlogist.agent_jobs import labelled_bags, opening_of, train_split
    from rlogist.model import RLogist
    from rlogist.modules import Architecture
    from rlogist.ppo import PPOSettings
    from rlogist.progress import training
    from rlogist.staged import StagedSettings
    from rlogist.training_run import CHECKPOINT
    from shared_core.command import usable_device

    check_no_run(out / CHECKPOINT, resume)
    device = usable_device(device)
    found = labelled_bags(features, labels)
    bags, held = train_split(found.bags, found.records, validation, seed)
    made = found.attributes
    dim = found.bags[0].scan.shape[1]
    model = RLogist(
        str(made["extractor"] or "unknown"),
        update=update.value,  # pyright: ignore[reportArgumentType]
        rho=rho,
        reward=reward.value,  # pyright: ignore[reportArgumentType]
        classes=found.classes,
        architecture=Architecture(dim, width=width, hidden=max(1, width // 2), whiten=whiten),
        seed=seed,
    )
    model.fingerprint = made["fingerprint"]
    model.opening = opening_of(made)
    make_folder(out)
    with training(out / "tensorboard" if tensorboard else None) as on_epoch:
        model.fit(
            bags,
            held,
            staged=StagedSettings(epochs=epochs, batch=batch),
            ppo=PPOSettings(steps=steps, n_envs=envs, joint_every=joint_every),
            folder=out,
            resume=resume,
            on_epoch=on_epoch,
            device=device,
        )
    model.save_pretrained(out)
    typer.echo(f"trained on {len(bags)} slides ({len(held)} for validation): {out}")


@app.command()
@with_options
def predict(
    slides: Slides,
    model: Model,
    out: Out,
    encoder: EncoderOptions,
    opened: SlideOptions,
    folder: FolderOptions,
    rho: Rho = None,
    strategy: Annotated[StrategyOption, typer.Option(help="how regions are chosen")] = StrategyOption.POLICY,
    html: Annotated[bool, typer.Option("--html", help="a page and GeoJSON for each slide too")] = False,
) -> int:
    """Read slides with a trained agent; writes class, path and ledger of each as JSON."""
    from functools import partial

    from rlogist.agent_jobs import AgentJob, load_model, predict_slide
    from rlogist.transition import check_rho

    if rho is not None:
        check_rho(rho)
    trained = load_model(model)
    encoding = encoder.encoding(trained.extractor_name, here=folder.here)
    if folder.here:
        load_model(model, encoding)  # another encoder than the model's is told once
    opening = opened.opening(trained.opening)
    job = partial(
        AgentJob,
        opening=opening,
        encoding=encoding,
        model=model.absolute(),
        rho=rho,
        strategy=strategy.value,
        report=html,
    )
    return _run_folder(predict_slide, slides, out, job, folder, encoding.gpus)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="folder of `rlogist predict`", file_okay=False)],
    labels: Labels,
    annotations: Annotated[Path | None, typer.Option(help="folder of ASAP XML files, for hits")] = None,
    split: Annotated[list[str] | None, typer.Option(help="only rows of this split; repeatable")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the numbers", callback=file_to_write())
    ] = None,
) -> None:
    """Compare predictions with labels: AUC with a bootstrap interval, accuracy, F1, what was read."""
    from rlogist.agent_jobs import judge
    from shared_core.files import write_json

    found = judge(predictions, labels, annotations, split or ())
    for name, value in found.items():
        shown = ", ".join(f"{v:.4g}" for v in value) if isinstance(value, list) else value
        typer.echo(f"{name}: {shown:.4g}" if isinstance(shown, float) else f"{name}: {shown}")
    if out is not None:
        write_json(out, found)


@app.command()
@with_options
def report(
    slide: Annotated[Path, typer.Argument(help="a slide", exists=True, dir_okay=False)],
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="the .html file; the GeoJSON is written beside it", callback=file_to_write(".html")
        ),
    ],
    encoder: EncoderOptions,
    opened: SlideOptions,
    rho: Rho = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="read the whole slide too, and show its attention")
    ] = False,
) -> None:
    """Read a slide and show the path, the probabilities and the reads on one page."""
    from rlogist.agent_jobs import load_model
    from rlogist.report import write_report

    trained = load_model(model, encoder.encoding(load_model(model).extractor_name))
    with opened.opening(trained.opening).open(slide) as reading:
        found = trained.predict(reading, rho=rho)
        whole = trained.predict(reading, strategy="exhaustive") if exhaustive else None
        write_report(out, reading, found, whole)
    typer.echo(f"{slide}: {found.label or found.status}, {found.looks} looks, {out}")


@app.command()
def prove(
    out: ProofFolder = Path("runs/rlogist"),
    seeds: Seeds = 3,
    quick: Quick = False,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> int:
    """Generate slide files and compare the agent with every other way to choose regions."""
    from rlogist.proof import FIRST_SEED, run_proof

    count = 1 if quick and seeds == 3 else seeds
    return run_proof(out, range(FIRST_SEED, FIRST_SEED + count), quick, jobs)


def _run_folder(work: Any, slides: Path, out: Path, job: Any, folder: FolderOptions, gpus: float = 0) -> int:
    """Work on all slides, say what became of each, and give the exit code."""
    from rlogist.progress import counting
    from rlogist.slide_jobs import run_folder

    backend = "ray" if folder.backend is Backend.RAY else "process"
    with counting("slides") as report:
        paths, done = run_folder(work, slides, out, job, folder.jobs, backend, report, gpus)
    for path, one in zip(paths, done, strict=True):
        if one.error is None:
            typer.echo(f"{path}: {one.result['status']}, {one.result['regions']} regions")
            for message in one.result["messages"]:
                typer.echo(f"  {message}", err=True)
    failed = [one for one in done if one.error]
    for one in failed:
        if one.fault:
            typer.echo(one.fault, err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(done)} slides failed:", err=True)
        for one in failed:
            path, error = str(paths[one.index]), str(one.error)
            typer.echo(f"  {error if path in error else f'{path}: {error}'}", err=True)
    return BAD_INPUT if failed else 0
