"""The command: `rlogist segment | extract | demo-slides`."""

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
    work: Any, slides: Path, out: Path, opening: Opening, encoding: Any, jobs: int, backend: Backend
) -> int:
    from rlogist.slide_jobs import run_folder

    with _progress("slides") as report:
        paths, done = run_folder(
            work, slides, out, opening, encoding, jobs, "ray" if backend is Backend.RAY else "process", report
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
