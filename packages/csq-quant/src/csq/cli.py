"""The command `csq`: train, harden, inspect, export and evaluate mixed-precision models, prove the claim."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from csq.settings import MethodName, Settings
from shared_core import InputError, command, files

if TYPE_CHECKING:
    import csq.data
    import csq.runs

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

METHODS = get_args(MethodName)
_DEFAULTS = {field.name: field.default for field in fields(Settings)}

app = typer.Typer(
    help="Mixed-precision quantization grown by bi-level continuous sparsification (CSQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (the claim does not hold) and 2 (bad input)."""
    command.run(app)


def _one_of(*known: str) -> Any:
    def check(value: str) -> str:
        if value not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {value!r}")
        return value

    return check


def _model_name(value: str | None) -> str | None:
    family, _, name = (value or "csq/x").partition("/")
    if not (family in ("csq", "torchvision", "timm") and name) and ":" not in str(value):
        raise typer.BadParameter(
            f"expected csq/resnet20, torchvision/NAME, timm/NAME or module:callable, got {value!r}"
        )
    return value


def _numbers(value: str | None) -> str | None:
    try:
        if not all(math.isfinite(float(part)) for part in (value or "0").split(",")):
            raise ValueError(value)
    except ValueError as error:
        raise typer.BadParameter(
            f"expected numbers with commas between, as 0.5,0.5,0.5; got {value!r}"
        ) from error
    return value


def _suffix(*suffixes: str) -> Any:
    def check(value: Path | None) -> Path | None:
        if value is not None and value.suffix not in suffixes:
            raise typer.BadParameter(
                f"expected a file name that ends in {' or '.join(suffixes)}, got {value}"
            )
        return value

    return check


def _setting(name: str, help_: str, known: tuple[str, ...] = (), **more: Any) -> Any:
    """An option whose default is that of `Settings`: None says that it was not given."""
    if known:
        more["callback"] = lambda value: value if value is None else _one_of(*known)(value)
    return typer.Option(help=help_, show_default=str(_DEFAULTS[name]), **more)


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with train/ and test/ (or val/) of class folders, CIFAR-10's binary files or MNIST's "
        "idx files; or digits, mnist5k."
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file, too.", dir_okay=False)
]
RunOrFile = Annotated[
    Path, typer.Argument(help="Folder of `csq train`, or a file of `csq harden`.", exists=True)
]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.", file_okay=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="csq/resnet20, torchvision/NAME, timm/NAME or module:callable.", callback=_model_name
        ),
    ] = None,
    data: Data = None,
    method: Annotated[str | None, _setting("method", f"{', '.join(METHODS)}.", METHODS)] = None,
    target_bits: Annotated[float | None, _setting("target_bits", "Average precision of weights.")] = None,
    budget: Annotated[
        str | None,
        _setting(
            "budget",
            "What is averaged: weights (model size), layers (the official way), bytes (stored bits).",
            ("weights", "layers", "bytes"),
        ),
    ] = None,
    n_bits: Annotated[int | None, _setting("n_bits", "Bit planes; 7 fit int8.", min=1, max=8)] = None,
    act_bits: Annotated[
        int | None, _setting("act_bits", "Bits of activations; 32 for none.", min=1, max=32)
    ] = None,
    act_method: Annotated[str | None, _setting("act_method", "pact or lsq.", ("pact", "lsq"))] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Layer to leave in floating point; may be repeated.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Safetensors state dict to start from; else random weights.")
    ] = None,
    init: Annotated[
        str | None,
        _setting(
            "init",
            "pretrained starts from the rounded weights, scratch as the official code; auto decides.",
            ("auto", "pretrained", "scratch"),
        ),
    ] = None,
    epochs: Annotated[int | None, _setting("epochs", "Passes over the training images.", min=1)] = None,
    batch_size: Annotated[int | None, _setting("batch_size", "Images a step.", min=1)] = None,
    lr: Annotated[float | None, _setting("lr", "Highest learning rate.")] = None,
    weight_decay: Annotated[
        float | None, _setting("weight_decay", "Of all but gates, masks and scales.", min=0)
    ] = None,
    optimizer: Annotated[str | None, _setting("optimizer", "sgd or adamw.", ("sgd", "adamw"))] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradients.")] = None,
    shift: Annotated[
        int | None, _setting("shift", "Augmentation: pixels that images move by.", min=0)
    ] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip", help="Augmentation: mirror half of the images.")
    ] = None,
    lam: Annotated[
        float | None, typer.Option(help="Weight of the budget's penalty; else by the number of steps.")
    ] = None,
    search: Annotated[float | None, _setting("search", "Share of the steps that search the scheme.")] = None,
    finetune: Annotated[
        str | None, _setting("finetune", "Temperature afterwards: hold or reramp.", ("hold", "reramp"))
    ] = None,
    contiguous: Annotated[
        bool | None, typer.Option("--contiguous", help="No gaps between a layer's planes: uniform grids.")
    ] = None,
    alpha: Annotated[float | None, _setting("alpha", "BSQ's regularizer, its handle on size.", min=0)] = None,
    float_share: Annotated[
        float | None, typer.Option(help="Share of the steps before quantization; else by method.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=4, help="Side that images are resized to; class folders need it.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Mean of each channel, 0.5,0.5,0.5.", callback=_numbers)
    ] = None,
    std: Annotated[str | None, typer.Option(help="Deviation of each channel.", callback=_numbers)] = None,
    validation: Annotated[
        float | None, _setting("validation", "Share cut out of the training images.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Training images to use.")] = None,
    seed: Annotated[int | None, _setting("seed", "Of weights, order and augmentation.", min=0)] = None,
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
    asked = {name: value for name, value in locals().items() if name in _DEFAULTS and value is not None}
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
            elif (out / CHECKPOINT).exists():
                raise InputError(
                    "holds a run already; --resume goes on with it, another folder takes a new one", file=out
                )
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
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bar:
        task = bar.add_task("training", total=run.steps, loss=math.nan)
        return run.train(images, device, lambda step, loss: bar.update(task, completed=step, loss=loss))


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
    table.add_row("top-1 of the validation part, soft", _percent(summary["validation_top1"]))
    files.write_json(run.folder / runs.REPORT, summary)
    command.print_table(table)


@app.command()
def harden(
    run: Annotated[Path, typer.Argument(help="Folder of `csq train`.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.", callback=_suffix(".safetensors"))],
    data: Data = None,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="Leave BatchNorm as it is and measure nothing.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Write the exact quantized model: integers at their stored width, one file that says what it is.

    BatchNorm is estimated anew on training images, and accuracy before and after is that of the validation
    part. A run of --method float becomes a plain state dict, for --weights.
    """
    with command.warnings_in_one_line():
        import csq
        from csq.evaluate import top1
        from csq.runs import TrainingRun

        opened, place = TrainingRun.open(run), command.usable_device(device)
        images = None if no_data else opened.images(data)
        soft = opened.soft_model().to(place)
        accuracy = None if images is None else top1(soft, images, images.validation)
        hard = opened.hard_model(images, place, warn=True)
        after = None if images is None else top1(hard, images, images.validation)
        table = Table("hardened", str(out))
        if opened.settings.method == "float":
            _save_float(hard, out)
        else:
            csq.save(hard, out, notes=opened.notes(validation_top1=after))
            report = csq.report(hard)
            table.add_row("paper bits", f"{report.average_bits:.3f}")
            table.add_row("stored bits", f"{report.average_stored_bits:.3f}")
        table.add_row("file", f"{out.stat().st_size:,} bytes")
        if accuracy is not None and after is not None:
            table.add_row("top-1 of the validation part, soft", _percent(accuracy))
            table.add_row("top-1 of the validation part, hardened", _percent(after))
            table.add_row("gap", f"{100 * (accuracy - after):+.2f} points")
        command.print_table(table)


def _save_float(model: Any, out: Path) -> None:
    from safetensors.torch import save_file

    with files.atomic_path(out) as temporary:
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()},
            temporary,
        )


@app.command()
def inspect(
    path: RunOrFile,
    png: Annotated[
        Path | None, typer.Option(help="Picture to write.", callback=_suffix(".png", ".svg", ".pdf"))
    ] = None,
    json: Json = None,
) -> None:
    """Show bits of each layer as bars, with paper bits, stored bits, bytes and bit operations."""
    with command.warnings_in_one_line():
        import csq
        from csq import runs, scheme_view

        if path.is_dir():
            run = runs.TrainingRun.open(path)
            _no_float(run)
            model, shape, activations = run.hard_model(None), run.shape, run.activations
            history, target, size = run.checkpoint.history, run.settings.target_bits, run.file_bytes(model)
            title = f"{run.settings.model}, {run.settings.method}"
        else:
            file = runs.HardenedFile.open(path)
            model, shape, activations = file.model, tuple(file.notes["shape"]), file.activations
            history, target, size = [], None, path.stat().st_size
            title = f"{file.notes['model']}, {file.notes.get('method', 'csq')}"
        report = csq.report(model)
        operations = runs.bit_operations(model, shape, activations)
        command.print_table(scheme_view.layer_table(report, operations))
        command.print_table(scheme_view.totals_table(report, operations, size))
        if png:
            scheme_view.draw(png, report, title, history, target)
        if json:
            numbers = {**report.totals(), "file_bytes": size, "bit_operations": operations.total}
            files.write_json(json, {**numbers, "macs": operations.macs, "layers": report.rows()})


def _no_float(run: csq.runs.TrainingRun) -> None:
    if run.settings.method == "float":
        raise InputError("was trained in floating point: it has no scheme", file=run.folder)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="File of `csq harden`.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="File to write, .onnx.", callback=_suffix(".onnx"))],
    opset: Annotated[int, typer.Option(help="18 to 23; 4-bit weights need 21.")] = 21,
    wide: Annotated[
        str,
        typer.Option(
            help="Layers of 9 stored bits, which pass int8: raise, or int16.",
            callback=_one_of("raise", "int16"),
        ),
    ] = "raise",
    data: Data = None,
) -> None:
    """Write a hardened model as ONNX with integer weights, and run it beside the model in onnxruntime.

    They are compared on test images of --data, else on noise.
    """
    with command.warnings_in_one_line():
        import torch

        import csq
        from csq.runs import HardenedFile

        file = HardenedFile.open(path)
        shape = file.notes["shape"]
        sample = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
        if data is not None:
            images = file.images(data)
            first = torch.arange(min(32, len(images.test.labels)))
            sample = images.inputs(images.test.read(first))
        form: Any = wide  # checked by the option
        csq.export_onnx(file.model, out, sample[:1], opset=opset, wide=form)
        with torch.no_grad():
            largest = float(file.model(sample).abs().max())
        difference = csq.compare_onnx(file.model, out, sample)
    table = Table("exported", str(out))
    table.add_row("bytes of the hardened file", f"{path.stat().st_size:,}")
    table.add_row("bytes of the ONNX file", f"{out.stat().st_size:,}")
    table.add_row(
        f"largest difference in onnxruntime, {len(sample)} {'images' if data else 'draws of noise'}",
        f"{difference:.3g} of {largest:.3g}",
    )
    command.print_table(table)


@app.command()
def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders of `csq train`, files of `csq harden`.", exists=True)
    ],
    data: Data = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Top-1 on the test part: of a run's soft and hardened model, of a file's model."""
    with command.warnings_in_one_line():
        import csq
        from csq.evaluate import top1
        from csq.runs import HardenedFile, TrainingRun

        place = command.usable_device(device)
        table = Table("test part", "top-1", "paper bits", "stored bits", "bytes")
        rows: list[dict[str, Any]] = []
        for path in paths:
            if path.is_dir():
                run = TrainingRun.open(path)
                images = run.images(data)
                models = {f"{path}, soft": run.soft_model().to(place)}
                size = 0
                if run.settings.method != "float":
                    models[f"{path}, hardened"] = hard = run.hard_model(images, place)
                    size = run.file_bytes(hard)
            else:
                file = HardenedFile.open(path)
                if data is None:
                    raise InputError("a file does not say where images are: which?", field="data")
                images, models = file.images(data), {str(path): file.model.to(place)}
                size = path.stat().st_size
            for name, model in models.items():
                row: dict[str, Any] = {"name": name, "top1": top1(model, images, images.test)}
                if not name.endswith(", soft"):
                    report = csq.report(model)
                    row |= {"paper_bits": report.average_bits, "stored_bits": report.average_stored_bits}
                    row["bytes"] = size
                rows.append(row | {"images": len(images.test.labels)})
                table.add_row(name, *_cells(row))
    command.print_table(table)
    if json:
        files.write_json(json, rows)


def _cells(row: dict[str, Any]) -> list[str]:
    bits = [f"{row[key]:.3f}" if key in row else "" for key in ("paper_bits", "stored_bits")]
    return [_percent(row["top1"]), *bits, f"{row['bytes']:,}" if "bytes" in row else ""]


@app.command()
def prove(
    out: Annotated[Path, typer.Option(help="Folder for proof.json and pictures.", file_okay=False)] = Path(
        "runs/csq-quant"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of images and weights.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run that shows the machinery.")] = False,
) -> None:
    """Show on embedded data whether the paper's claims hold; exit code 0 where they do, 1 where not."""
    from csq.proof import prove as run_proof

    raise typer.Exit(run_proof(out, seeds, quick))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
