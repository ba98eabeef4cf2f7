"""`csq train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from csq.cli_options import DEFAULTS, METHODS, Data, model_name, percent, setting
from csq.settings import Settings
from shared_core import InputError, command, files
from shared_core.command import Device, folder_to_write, progress_bar, with_commas

if TYPE_CHECKING:
    import csq.data
    import csq.runs


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.", callback=folder_to_write)],
    model: Annotated[
        str | None,
        typer.Option(
            help="csq/resnet20, torchvision/NAME, timm/NAME or module:callable.", callback=model_name
        ),
    ] = None,
    data: Data = None,
    method: Annotated[str | None, setting("method", f"{', '.join(METHODS)}.", METHODS)] = None,
    target_bits: Annotated[float | None, setting("target_bits", "Average precision of weights.")] = None,
    budget: Annotated[
        str | None,
        setting(
            "budget",
            "What is averaged: weights (model size), layers (the official way), bytes (stored bits).",
            ("weights", "layers", "bytes"),
        ),
    ] = None,
    n_bits: Annotated[int | None, setting("n_bits", "Bit planes; 7 fit int8.", min=1, max=8)] = None,
    act_bits: Annotated[
        int | None, setting("act_bits", "Bits of activations; 32 for none.", min=1, max=32)
    ] = None,
    act_method: Annotated[str | None, setting("act_method", "pact or lsq.", ("pact", "lsq"))] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Layer to leave in floating point; may be repeated.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Safetensors state dict to start from; else random weights.")
    ] = None,
    init: Annotated[
        str | None,
        setting(
            "init",
            "pretrained starts from the rounded weights, scratch as the official code; auto decides.",
            ("auto", "pretrained", "scratch"),
        ),
    ] = None,
    epochs: Annotated[int | None, setting("epochs", "Passes over the training images.", min=1)] = None,
    batch_size: Annotated[int | None, setting("batch_size", "Images a step.", min=1)] = None,
    lr: Annotated[float | None, setting("lr", "Highest learning rate.")] = None,
    weight_decay: Annotated[
        float | None, setting("weight_decay", "Of all but gates, masks and scales.", min=0)
    ] = None,
    optimizer: Annotated[str | None, setting("optimizer", "sgd or adamw.", ("sgd", "adamw"))] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradients.")] = None,
    shift: Annotated[int | None, setting("shift", "Augmentation: pixels that images move by.", min=0)] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip", help="Augmentation: mirror half of the images.")
    ] = None,
    lam: Annotated[
        float | None, typer.Option(help="Weight of the budget's penalty; else by the number of steps.")
    ] = None,
    search: Annotated[float | None, setting("search", "Share of the steps that search the scheme.")] = None,
    finetune: Annotated[
        str | None, setting("finetune", "Temperature afterwards: hold or reramp.", ("hold", "reramp"))
    ] = None,
    contiguous: Annotated[
        bool | None, typer.Option("--contiguous", help="No gaps between a layer's planes: uniform grids.")
    ] = None,
    alpha: Annotated[float | None, setting("alpha", "BSQ's regularizer, its handle on size.", min=0)] = None,
    float_share: Annotated[
        float | None, typer.Option(help="Share of the steps before quantization; else by method.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=4, help="Side that images are resized to; class folders need it.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel, 0.5,0.5,0.5.", callback=with_commas)
    ] = None,
    std: Annotated[str | None, typer.Option(help="Deviation of each channel.", callback=with_commas)] = None,
    validation: Annotated[
        float | None, setting("validation", "Share cut out of the training images.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Training images to use.")] = None,
    seed: Annotated[int | None, setting("seed", "Of weights, order and augmentation.", min=0)] = None,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT, where there is one.")
    ] = False,
) -> None:
    """Train a model to an average precision, and write the run to a folder.

    A run that was interrupted goes on by the same command with --resume, or by `csq train --out OUT --resume`
    alone, to the same last bit. Accuracies are of validation images; only `csq evaluate` reads the
    test part.
    """
    asked = {name: value for name, value in locals().items() if name in DEFAULTS and value is not None}
    for name in ("mean", "std"):
        if name in asked:
            asked[name] = tuple(float(part) for part in asked[name].split(","))
    if "skip" in asked:
        asked["skip"] = tuple(asked["skip"])
    with command.warnings_in_one_line():
        from csq import runs
        from csq.training import CHECKPOINT

        if (out / runs.RUN).exists():
            if resume:
                asked = _same_settings(asked, runs.TrainingRun.open(out))
            files.check_no_run(out / CHECKPOINT, resume)
        elif resume and "model" not in asked:
            raise InputError("holds no run to go on with", file=out)
        for name in ("model", "data"):
            if name not in asked:
                raise InputError("which one?", field=name)
        settings = Settings(**asked)
        images = runs.read_images(settings)
        run = runs.TrainingRun.begin(out, settings, images)
        trained = _with_progress(run, images, command.usable_device(device))
        ended = runs.TrainingRun.open(out)
        _finish(ended, trained.history)


def _same_settings(asked: dict[str, Any], run: csq.runs.TrainingRun) -> dict[str, Any]:
    """The kept run's settings; an option that was given must be what it was."""
    kept = asdict(run.settings)
    for name, value in asked.items():
        if value != kept[name]:
            raise InputError(
                f"is another run: expected {kept[name]}, as it began with",
                file=run.folder,
                field=name.replace("_", "-"),
                value=value,
            )
    return kept


def _with_progress(run: csq.runs.TrainingRun, images: csq.data.ImageData, device: str) -> Any:
    with progress_bar("training", run.steps) as bar:
        return run.train(images, device, bar)


def _finish(run: csq.runs.TrainingRun, history: list[dict[str, Any]]) -> None:
    """Write report.json and print what came out."""
    from csq import runs

    validated = [record["validation"] for record in history if "validation" in record]
    summary: dict[str, Any] = {"method": run.settings.method, "steps": run.steps}
    summary["validation_top1"] = validated[-1] if validated else None
    if run.settings.method != "float":
        import csq

        hard = run.hard_model(None, warn=True)
        report, size = csq.report(hard), run.file_bytes(hard)
        summary |= {"target_bits": run.settings.target_bits, **report.totals(), "file_bytes": size}
        summary["layers"] = report.rows()
        table = Table("trained", f"{run.settings.model}, {run.settings.method}")
        table.add_row("paper bits", f"{report.average_bits:.3f} (target {run.settings.target_bits:g})")
        table.add_row("stored bits", f"{report.average_stored_bits:.3f}")
        table.add_row("file, once hardened", f"{size:,} bytes")
    else:
        table = Table("trained", f"{run.settings.model}, floating point")
    table.add_row("top-1 of the validation part, soft", percent(summary["validation_top1"]))
    files.write_json(run.folder / runs.REPORT, summary)
    command.print_table(table)
