"""The command: `rlogist demo-slides | segment | extract | train | predict | evaluate | report | prove`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared_core.command import BAD_INPUT, run

if TYPE_CHECKING:
    from rlogist.slide_jobs import Opening

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reads whole-slide images by looking at few regions in depth (RLogist).",
)

# Torch, OpenSlide and all that needs them are imported inside the commands: help answers at once.


class Backend(StrEnum):
    """What runs many slides side by side."""

    PROCESS = "process"
    RAY = "ray"


Slides = Annotated[Path, typer.Argument(help="a slide, or a folder of slides (searched to any depth)")]
Out = Annotated[Path, typer.Option(help="folder for results")]
ScanMpp = Annotated[float, typer.Option(help="microns per pixel of the scan; 2.0 is 5x")]
DeepMpp = Annotated[float, typer.Option(help="microns per pixel of the deep look; 0.5 is 20x")]
Patch = Annotated[int, typer.Option(min=16, help="side of a patch in pixels, at both magnifications")]
Mpp = Annotated[float | None, typer.Option(help="microns per pixel of level 0, where files do not state it")]
Threshold = Annotated[int, typer.Option(min=0, max=255, help="saturation above which a pixel is tissue")]
Otsu = Annotated[bool, typer.Option("--otsu", help="Otsu's threshold of each slide in the fixed one's place")]
TissueArea = Annotated[
    float, typer.Option(min=0, help="least area of a piece of tissue, in 512 x 512 level-0 squares")
]
Jobs = Annotated[int, typer.Option(min=1, help="processes; on a cluster, what Ray may use on this machine")]
BackendOption = Annotated[Backend, typer.Option(help="ray: the cluster of `ray start`, extra [ray]")]


def main() -> None:
    """Run the command, with the exit codes 0, 1 (a claim does not hold) and 2 (bad input, a slide failed)."""
    run(app)


@app.command()
def segment(
    slides: Slides,
    out: Out,
    scan_mpp: ScanMpp = 2.0,
    deep_mpp: DeepMpp = 0.5,
    patch: Patch = 256,
    mpp: Mpp = None,
    threshold: Threshold = 8,
    otsu: Otsu = False,
    tissue_area: TissueArea = 100.0,
    jobs: Jobs = 1,
    backend: BackendOption = Backend.PROCESS,
) -> int:
    """Find tissue and lay the region grid; writes a picture, JSON, and GeoJSON for QuPath for each slide."""
    from rlogist.slide_jobs import segment_slide

    opening = _opening(scan_mpp, deep_mpp, patch, mpp, threshold, otsu, tissue_area)
    return _run_folder(segment_slide, slides, out, opening, None, jobs, backend)


@app.command()
def extract(
    slides: Slides,
    out: Out,
    extractor: Annotated[
        str, typer.Option(help="resnet50, stain, timm/NAME, hf/NAME-OR-FOLDER or module:callable")
    ] = "resnet50",
    weights: Annotated[
        Path | None, typer.Option(help="state dict of the encoder, .safetensors", exists=True, dir_okay=False)
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--random", help="the library's weights, or random ones")
    ] = True,
    deep: Annotated[
        bool, typer.Option("--deep/--scan-only", help="read every region at depth too, for training")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="patches a forward pass")] = 32,
    scan_mpp: ScanMpp = 2.0,
    deep_mpp: DeepMpp = 0.5,
    patch: Patch = 256,
    mpp: Mpp = None,
    threshold: Threshold = 8,
    otsu: Otsu = False,
    tissue_area: TissueArea = 100.0,
    jobs: Jobs = 1,
    backend: BackendOption = Backend.PROCESS,
) -> int:
    """Extract features to HDF5, one file a slide; run again to go on where it was interrupted."""
    from rlogist.slide_jobs import Encoding, extract_slide

    encoding = Encoding(extractor, pretrained, weights, device, batch_size, deep)
    encoding.load()  # what is wrong with the extractor is wrong for every slide: said once, before any work
    opening = _opening(scan_mpp, deep_mpp, patch, mpp, threshold, otsu, tissue_area)
    return _run_folder(extract_slide, slides, out, opening, encoding, jobs, backend)


@app.command("demo-slides")
def demo_slides(
    out: Out,
    slides: Annotated[int, typer.Option(min=1, help="how many")] = 60,
    slides_per_patient: Annotated[int, typer.Option(min=1, help="slides of one patient")] = 2,
    size: Annotated[int, typer.Option(min=1024, help="side of a slide in pixels, a multiple of 256")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="which slides")] = 0,
    jobs: Jobs = 1,
) -> None:
    """Generate slides of real H&E texture whose lesions only a deep look tells apart, with labels."""
    from rlogist.demo_slides import DemoWorld, make_demo_slides

    world = DemoWorld(size=size)
    with _progress("slides") as report:
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
    seed: Annotated[int, typer.Option(min=0, help="of all randomness")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in --out")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="scalars to OUT/tensorboard")] = False,
) -> None:
    """Train all stages on feature files; writes a checkpoint after each epoch and the model at the end."""
    from rlogist.agent_jobs import labelled_bags, train_split
    from rlogist.model import RLogist
    from rlogist.modules import Architecture
    from rlogist.ppo import PPOSettings
    from rlogist.rewards import default_discount
    from rlogist.staged import StagedSettings

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
    model.opening = {} if made["patch_size"] is None else {"patch": int(made["patch_size"])}
    out.mkdir(parents=True, exist_ok=True)
    discount = default_discount(reward.value)  # pyright: ignore[reportArgumentType]
    with _training(out / "tensorboard" if tensorboard else None) as on_epoch:
        model.fit(
            bags,
            held,
            staged=StagedSettings(epochs=epochs, batch=batch),
            ppo=PPOSettings(steps=steps, n_envs=envs, discount=discount, joint_every=joint_every),
            folder=out,
            resume=resume,
            on_epoch=on_epoch,
        )
    model.save_pretrained(out)
    typer.echo(f"trained on {len(bags)} slides ({len(held)} for validation): {out}")


@app.command()
def predict(
    slides: Slides,
    model: Model,
    out: Out,
    rho: Rho = None,
    strategy: Annotated[StrategyOption, typer.Option(help="how regions are chosen")] = StrategyOption.POLICY,
    html: Annotated[bool, typer.Option("--html", help="a page and GeoJSON for each slide too")] = False,
    scan_mpp: ScanMpp = 2.0,
    deep_mpp: DeepMpp = 0.5,
    patch: Annotated[int | None, typer.Option(min=16, help="side of a patch; the trained one")] = None,
    mpp: Mpp = None,
    threshold: Threshold = 8,
    otsu: Otsu = False,
    tissue_area: TissueArea = 100.0,
    jobs: Jobs = 1,
    backend: BackendOption = Backend.PROCESS,
) -> int:
    """Read slides with a trained agent; writes class, path and ledger of each as JSON."""
    from functools import partial

    from rlogist.agent_jobs import AgentJob, load_model, predict_slide
    from rlogist.transition import check_rho

    if rho is not None:
        check_rho(rho)
    side = patch or int(load_model(model).opening.get("patch", 256))
    opening = _opening(scan_mpp, deep_mpp, side, mpp, threshold, otsu, tissue_area)
    job = partial(AgentJob, model=model, rho=rho, strategy=strategy.value, report=html)
    return _run_folder(predict_slide, slides, out, opening, None, jobs, backend, job)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="folder of `rlogist predict`", file_okay=False)],
    labels: Labels,
    annotations: Annotated[Path | None, typer.Option(help="folder of ASAP XML files, for hits")] = None,
    split: Annotated[list[str] | None, typer.Option(help="only rows of this split; repeatable")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
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
def report(
    slide: Annotated[Path, typer.Argument(help="a slide", exists=True, dir_okay=False)],
    model: Model,
    out: Annotated[Path, typer.Option(help="the .html file; the GeoJSON is written beside it")],
    rho: Rho = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="read the whole slide too, and show its attention")
    ] = False,
    scan_mpp: ScanMpp = 2.0,
    deep_mpp: DeepMpp = 0.5,
    patch: Annotated[int | None, typer.Option(min=16, help="side of a patch; the trained one")] = None,
    mpp: Mpp = None,
    threshold: Threshold = 8,
    otsu: Otsu = False,
    tissue_area: TissueArea = 100.0,
) -> None:
    """Read a slide and show the path, the probabilities and the reads on one page."""
    from rlogist.agent_jobs import load_model
    from rlogist.report import write_report

    trained = load_model(model)
    side = patch or int(trained.opening.get("patch", 256))
    opening = _opening(scan_mpp, deep_mpp, side, mpp, threshold, otsu, tissue_area)
    with opening.open(slide) as opened:
        found = trained.predict(opened, rho=rho)
        whole = trained.predict(opened, strategy="exhaustive") if exhaustive else None
        write_report(out, opened, found, whole)
    typer.echo(f"{slide}: {found.label or found.status}, {found.looks} looks, {out}")


@app.command()
def prove(
    out: Out = Path("runs/rlogist"),
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 to N-1")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="a shortened run")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> int:
    """Generate slide files and compare the agent with every other way to choose regions."""
    from rlogist.proof import run_proof

    return run_proof(out, range(1 if quick and seeds == 3 else seeds), quick, jobs)


def _opening(
    scan_mpp: float,
    deep_mpp: float,
    patch: int,
    mpp: float | None,
    threshold: int,
    otsu: bool,
    tissue_area: float,
) -> Opening:
    from rlogist.slide_jobs import Opening
    from rlogist.tissue import Segmentation

    settings = Segmentation(threshold=threshold, otsu=otsu, tissue_area=tissue_area)
    return Opening(scan_mpp, deep_mpp, patch, mpp, settings)


def _run_folder(
    work: Any,
    slides: Path,
    out: Path,
    opening: Opening,
    encoding: Any,
    jobs: int,
    backend: Backend,
    job: Any = None,
) -> int:
    from rlogist.slide_jobs import Job, run_folder

    with _progress("slides") as report:
        paths, done = run_folder(
            work,
            slides,
            out,
            opening,
            encoding,
            jobs,
            "ray" if backend is Backend.RAY else "process",
            report,
            job or Job,
        )
    failed = [one for one in done if one.error]
    for path, one in zip(paths, done, strict=True):
        if one.error is None:
            typer.echo(f"{path}: {one.result['status']}, {one.result['regions']} regions")
            for message in one.result["messages"]:
                typer.echo(f"  {message}", err=True)
    for one in failed:
        if one.fault:
            typer.echo(one.fault, err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(done)} slides failed:", err=True)
        for one in failed:
            named = (
                one.error if str(paths[one.index]) in str(one.error) else f"{paths[one.index]}: {one.error}"
            )
            typer.echo(f"  {named}", err=True)
    return BAD_INPUT if failed else 0


def _progress(what: str) -> Any:
    """A context that gives a function of (done, all), which moves a bar on stderr."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown():
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        hidden = not console.is_terminal  # a log file gets the lines of the slides, and no blank ones
        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    return shown()


def _training(tensorboard: Path | None) -> Any:
    """A context that gives an `on_epoch` with a bar a stage on stderr, and TensorBoard's scalars if asked."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rlogist.training_run import TensorBoard

    @contextmanager
    def shown():
        console = Console(stderr=True)
        columns = (
            TextColumn("stage {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        writer = None if tensorboard is None else TensorBoard(tensorboard)
        tasks: dict[str, Any] = {}
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

            def on_epoch(stage: str, done: int, total: int, scalars: dict[str, float]) -> None:
                task = tasks.setdefault(stage, None)
                if task is None:
                    task = tasks[stage] = bar.add_task(stage, total=total)
                bar.update(task, completed=done)
                if writer is not None:
                    writer(stage, done, total, scalars)

            yield on_epoch
        if writer is not None:
            writer.close()

    return shown()
