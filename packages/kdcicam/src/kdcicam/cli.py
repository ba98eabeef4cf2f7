"""The command `kdcicam`: train teachers and students, evaluate, localize, compare, prove."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcicam.settings import PRESETS, TEACHER_ROLES, Settings, map_of, settings_from
from shared_core import InputError, command, files
from shared_core.command import (
    Device,
    ProofFolder,
    Quick,
    Seeds,
    file_to_write,
    folder_to_write,
    main_process,
    one_of,
    progress_bar,
)

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

app = typer.Typer(
    help="Object boxes from image labels: causal intervention CAMs and a student of two teachers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (a claim does not hold) and 2 (bad input)."""
    command.run(app)


def _threshold(value: str) -> str:
    try:
        fits = value in ("validation", "oracle") or 0 <= float(value) < 1
    except ValueError:
        fits = False
    if not fits:
        raise typer.BadParameter(f"expected validation, oracle or a share from 0 to below 1, got {value!r}")
    return value


Out = Annotated[Path, typer.Option(help="Folder of the run.", callback=folder_to_write)]
Data = Annotated[
    Path,
    typer.Option(
        help="CUB-200-2011, ILSVRC, a wsolevaluation metadata folder, or train/ and test/ of class folders "
        "with COCO boxes in train.json and test.json.",
        file_okay=False,
    ),
]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", help="wsolevaluation: the folder of the images.", file_okay=False)
]
MasksOption = Annotated[
    Path | None,
    typer.Option(
        "--masks",
        help="OpenImages: the folder of the masks, where it is not that of the images.",
        file_okay=False,
    ),
]
Recipe = Annotated[str | None, typer.Option(help=f"One of {', '.join(PRESETS)}.", callback=one_of(*PRESETS))]
Backbone = Annotated[
    str | None, typer.Option(help="vgg16, vgg16-imagenet, inception_v3, a timm name, or module:callable.")
]
Weights = Annotated[Path | None, typer.Option(help="The backbone's ImageNet weights.", dir_okay=False)]
Epochs = Annotated[int | None, typer.Option(min=1)]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images a step, of all processes together.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate of the classifier.")]
ImageSize = Annotated[
    int | None, typer.Option(min=8, help="Side of the images; else 299 for inception_v3, 224 for others.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of weights, order and augmentation.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE of any other setting; may be repeated.")
]
Precision = Annotated[
    str | None, typer.Option(help="no, fp16 or bf16.", callback=one_of("no", "fp16", "bf16"))
]
OnError = Annotated[
    str, typer.Option(help="Unreadable images: raise, or skip and count.", callback=one_of("raise", "skip"))
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT, where there is one.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file.", callback=file_to_write())
]
ProtocolOption = Annotated[
    str,
    typer.Option(
        help="full: the whole image resized; center_crop: the authors', boxes clipped to the crop.",
        callback=one_of("full", "center_crop"),
    ),
]
Resize = Annotated[int | None, typer.Option(min=8, help="Side before the centre crop.")]
ThresholdOption = Annotated[
    str,
    typer.Option(help="validation (chosen on other images), a share, or oracle.", callback=_threshold),
]
Validation = Annotated[
    float | None,
    typer.Option(help="Share of training images for the threshold; else what training left out.", max=0.99),
]
Contours = Annotated[bool, typer.Option(help="Whether to count MaxBoxAcc.")]


@app.command("train-teacher")
def train_teacher(
    out: Out,
    data: Data,
    role: Annotated[
        str | None,
        typer.Option(
            help="cls or loc: the teachers, each with its auxiliary loss; ci-cam, nl-ccam, cam: baselines.",
            callback=one_of(*TEACHER_ROLES),
        ),
    ] = None,
    recipe: Recipe = None,
    images: ImagesOption = None,
    backbone: Backbone = None,
    weights: Weights = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    mixed_precision: Precision = None,
    settings: Set = None,
    on_error: OnError = "raise",
    device: Device = "auto",
    resume: Resume = False,
) -> None:
    """Train a teacher, or a baseline, from image labels.

    For several processes: accelerate launch -m kdcicam train-teacher ...
    """
    given = _given(locals())
    if role is None and recipe is None:
        raise InputError("which one? --role or --recipe", field="role")
    if recipe is not None and PRESETS[recipe]["role"] == "student":
        raise InputError("is for train-student", field="recipe", value=recipe)
    _train(out, recipe, given, settings, resume, device)


@app.command("train-student")
def train_student(
    out: Out,
    data: Data,
    cls: Annotated[
        Path | None, typer.Option(help="Folder of the classification teacher.", file_okay=False)
    ] = None,
    loc: Annotated[
        Path | None, typer.Option(help="Folder of the localization teacher.", file_okay=False)
    ] = None,
    recipe: Recipe = None,
    images: ImagesOption = None,
    backbone: Backbone = None,
    weights: Weights = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    mixed_precision: Precision = None,
    settings: Set = None,
    on_error: OnError = "raise",
    device: Device = "auto",
    resume: Resume = False,
) -> None:
    """Train a student of two teachers, or of one, or of none: the control with the same images and steps."""
    given = _given(locals())
    if recipe is not None and PRESETS[recipe]["role"] != "student":
        raise InputError("is for train-teacher", field="recipe", value=recipe)
    from kdcicam.runs import student_flags

    named = command.assigned(settings or [], Settings)
    paths = {"cls_teacher": cls, "loc_teacher": loc}
    given |= {"role": "student", **{key: str(path) for key, path in paths.items() if path is not None}}
    given["flags"] = student_flags(given.get("cls_teacher"), given.get("loc_teacher"), named.get("flags"))
    _train(out, recipe, given, settings, resume, device)


_NAMES = (
    "data", "role", "images", "backbone", "weights", "epochs", "batch_size", "lr", "image_size", "seed",
    "mixed_precision", "on_error",
)  # fmt: skip


def _given(options: dict[str, Any]) -> dict[str, Any]:
    found = {name: options[name] for name in _NAMES if options.get(name) is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def _train(
    out: Path, recipe: str | None, given: dict[str, Any], more: list[str] | None, resume: bool, device: str
) -> None:
    asked: Settings = settings_from(recipe, {**given, **command.assigned(more or [], Settings)})
    with command.warnings_in_one_line():
        from kdcicam import runs
        from kdcicam.training import CHECKPOINT

        if (out / runs.RUN).exists() and resume:
            run = runs.resumed(asked, out)
            images, _ = runs.training_images(run.settings)
        else:
            if (out / CHECKPOINT).exists():
                raise InputError("holds a run already; --resume goes on with it", file=out)
            run, images = runs.TrainingRun.begin(out, asked)
        with progress_bar("training", run.steps(images)) as step:
            trained = run.train(images, command.usable_device(device), step)
    if main_process():
        last = trained.history[-1] if trained.history else {}
        _table(
            f"{asked.role}, {asked.backbone}",
            {
                "images": f"{len(images)}, {run.skipped} unreadable",
                "steps": str(run.steps(images)),
                "loss, last epoch": f"{last.get('loss', math.nan):.4f}",
                "top-1 in training, last epoch": _percent(last.get("train_top1")),
                "classes in the pool": f"{last.get('classes_in_pool', 0)} of {len(run.classes)}",
                "KL": asked.kl if asked.role == "student" else "",
                "note": last.get("note", ""),
                "model": str(out),
            },
        )


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", exists=True)],
    data: Data,
    images: ImagesOption = None,
    masks: MasksOption = None,
    protocol: ProtocolOption = "full",
    thr: ThresholdOption = "validation",
    resize: Resize = None,
    validation: Validation = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    contours: Contours = True,
    pool: Annotated[Path | None, typer.Option(help="Context pool, where the weights lack it.")] = None,
    on_error: OnError = "raise",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Classification and localization on the test images, beside boxes that need no model.

    The map is the one that the model's role was trained for; compare reads others too.
    """
    rows = _evaluated(
        {str(model): (model, None)},
        data, images, masks, protocol, thr, resize, validation, batch_size, contours,
        on_error, device, pool,
    )  # fmt: skip
    _show(rows, json)


@app.command()
def compare(
    models: Annotated[list[Path], typer.Argument(help="Folders of trained models.", exists=True)],
    data: Data,
    methods: Annotated[
        str, typer.Option(help="Maps to read from each model, of ci-cam, nl-ccam, cam, grad-cam.")
    ] = "ci-cam,nl-ccam,cam,grad-cam",
    images: ImagesOption = None,
    masks: MasksOption = None,
    protocol: ProtocolOption = "full",
    thr: ThresholdOption = "validation",
    resize: Resize = None,
    validation: Validation = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    contours: Contours = True,
    on_error: OnError = "raise",
    device: Device = "auto",
    json: Json = None,
) -> None:
    """A table of models and of ways to read a map from each, all boxed by the same extractor."""
    kinds = tuple(name.strip() for name in methods.split(","))
    rows = _evaluated(
        {str(path): (path, kinds) for path in models},
        data, images, masks, protocol, thr, resize, validation, batch_size, contours,
        on_error, device, None,
    )  # fmt: skip
    _show(rows, json)


def _evaluated(
    models: dict[str, tuple[Path, tuple[str, ...] | None]],
    data: Path,
    images: Path | None,
    masks: Path | None,
    protocol: str,
    thr: str,
    resize: int | None,
    validation: float | None,
    batch_size: int,
    contours: bool,
    on_error: str,
    device: str,
    pool: Path | None,
) -> list[dict[str, Any]]:
    with command.warnings_in_one_line():
        from kdcicam.checkpoints import load_model, read_config
        from kdcicam.data import load_images
        from kdcicam.evaluation import evaluate as run

        test = load_images(data, "test", images=images, masks=masks)
        which: Any = protocol  # both are checked by their options
        chosen: Any = thr if thr in ("validation", "oracle") else float(thr)
        rows = []
        for name, (path, methods) in models.items():
            loaded = load_model(path, pool=pool)
            if loaded.num_classes != len(test.classes):
                raise InputError(f"knows {loaded.num_classes} classes", file=path, value=len(test.classes))
            notes = read_config(path if path.is_dir() else path.parent)["notes"]
            role, held = notes.get("role", ""), None
            if thr == "validation" and test.boxed:
                # What the model was not trained on: a threshold of its own training images would flatter it.
                share = notes.get("validation", 0.1) if validation is None else validation
                held = load_images(data, "val", images=images, validation=share, masks=masks)
            total = len(test) + (0 if held is None else len(held))
            with progress_bar(f"evaluating {path.name}", total) as bar:
                done = _Counter(bar)
                found = run(
                    loaded,
                    test,
                    held,
                    protocol=which,
                    threshold=chosen,
                    methods=(map_of(role),) if methods is None else methods,
                    resize=resize,
                    batch_size=batch_size,
                    device=command.usable_device(device),
                    skip=on_error == "skip",
                    progress=done,
                    contours=contours,
                )
            for method, result in found.items():
                about = {"model": name, "role": role, "map": method, "unreadable": result.skipped}
                rows.append({**about, "protocol": protocol, **result.scores})
        return rows


class _Counter:
    def __init__(self, bar: Callable[[int, float], None]) -> None:
        self.bar, self.done = bar, 0

    def __call__(self, more: int) -> None:
        self.done += more
        self.bar(self.done, math.nan)


_COLUMNS = {
    "top1_cls": "top-1 cls", "top1_loc": "top-1 loc", "top5_loc": "top-5 loc", "gt_known": "GT-known",
    "max_box_acc": "MaxBoxAcc", "max_box_acc_v2": "MaxBoxAccV2", "pxap": "PxAP",
}  # fmt: skip


def _show(rows: list[dict[str, Any]], json: Path | None) -> None:
    from rich.table import Table

    first = rows[0]
    lacking = (
        f", {first['unboxed']} without box" if "threshold" in first else ""
    )  # else they have masks alone
    table = Table(title=f"{first['protocol']} protocol, {first['images']} images{lacking}")
    columns = [key for key in _COLUMNS if key in first]
    for heading in ("model", "map", *(_COLUMNS[key] for key in columns), "threshold"):
        table.add_column(heading)
    for row in rows:
        cells = [_percent(row[key]) for key in columns]
        source = " (oracle)" if "oracle" in row.get("threshold_from", "") else ""
        threshold = f"{row['threshold']:.2f}{source}" if "threshold" in row else ""  # masks need none
        table.add_row(f"{row['model']} ({row['role']})", row["map"], *cells, threshold)
    for key, name in (("whole_crop", "whole crop"), ("center_box", "centre box")):
        if key in first:
            fixed = [_percent(first[key].get(column)) for column in columns]
            table.add_row(f"{name}, class of the first row", "no map", *fixed, "")
    command.print_table(table)
    for row in rows:
        if row["unreadable"] or row["no_map"]:
            print(
                f"{row['model']}, {row['map']}: {row['unreadable']} unreadable images, "
                f"{row['no_map']} empty maps"
            )
    if json is not None:
        files.write_json(json, rows)


@app.command()
def localize(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", exists=True)],
    paths: Annotated[list[Path], typer.Argument(metavar="IMG...", help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for boxes.json and overlays.", callback=folder_to_write)],
    thr: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the map's maximum.")] = 0.14,
    topk: Annotated[int, typer.Option(min=1, help="Classes to name.")] = 5,
    mode: Annotated[
        str, typer.Option(help="official or contour.", callback=one_of("official", "contour"))
    ] = "official",
    overlays: Annotated[bool, typer.Option(help="Whether to draw.")] = True,
    pool: Annotated[Path | None, typer.Option(help="Context pool, where the weights lack it.")] = None,
    on_error: OnError = "raise",
    device: Device = "auto",
) -> None:
    """Class and box of each image, as JSON in the image's own pixels, and a picture of the map."""
    with command.warnings_in_one_line():
        from kdcicam.checkpoints import load_model
        from kdcicam.localization import listed, localized

        loaded, images = load_model(model, pool=pool), listed(paths)
        out.mkdir(parents=True, exist_ok=True)
        rows, skipped = [], 0
        place = command.usable_device(device)
        with progress_bar("localizing", len(images)) as bar:
            for row in localized(
                loaded, model, images, out if overlays else None, thr, topk, mode, place, on_error == "skip"
            ):
                skipped += "error" in row
                rows.append(row)
                bar(len(rows), math.nan)
        files.write_json(
            out / "boxes.json", {"model": str(model), "threshold": thr, "mode": mode, "images": rows}
        )
    _table(
        "localized",
        {
            "images": str(len(rows) - skipped),
            "unreadable": str(skipped),
            "maps that showed nothing": str(sum(not row.get("found", True) for row in rows)),
            "boxes": str(out / "boxes.json"),
        },
    )


@app.command()
def prove(
    out: ProofFolder = Path("runs/kdcicam"),
    seeds: Seeds = 3,
    quick: Quick = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> int:
    """Compare the student of two teachers with all baselines on composed images with a confounder."""
    with command.warnings_in_one_line():
        from kdcicam.proof import run_proof

        return run_proof(out, range(1 if quick and seeds == 3 else seeds), quick, jobs)


def _table(title: str, rows: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(title, "")
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    command.print_table(table)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"
