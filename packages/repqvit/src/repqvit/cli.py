"""The command `repqvit`: quantize, evaluate, export and inspect vision transformers, and prove the claim."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared_core import InputError, command, files
from shared_core.command import Device, ProofFolder, Quick, Seeds, file_to_write, with_commas

if TYPE_CHECKING:
    import repqvit.quantized
    import repqvit.ranges
    import repqvit.sources

# Torch and all that needs it are imported inside the commands: help and wrong arguments answer at once.

RECIPE_NAMES = (
    "repqvit",
    "repqvit-strict",
    "repqvit-official",
    "channelwise",
    "minmax",
    "percentile",
    "mse",
    "percentile-mse",
    "percentile-mse-log2",
    "fq-vit",
    "twin-uniform",
    "smoothquant",
)

app = typer.Typer(
    help="Post-training quantization of vision transformers by scale reparameterization (RepQ-ViT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (the claim does not hold) and 2 (bad input)."""
    command.run(app)


def _model_name(value: str) -> str:
    family, _, name = value.partition("/")
    if not (family in ("timm", "torchvision", "hf") and name) and ":" not in value:
        raise typer.BadParameter(
            f"expected timm/NAME, torchvision/NAME, hf/NAME-OR-FOLDER or module:callable, got {value!r}"
        )
    return value


def _recipe(value: str) -> str:
    if value not in RECIPE_NAMES:
        raise typer.BadParameter(f"no recipe {value!r}: expected one of {', '.join(RECIPE_NAMES)}")
    return value


ModelName = Annotated[
    str,
    typer.Option(
        help="timm/NAME, torchvision/NAME, hf/NAME-OR-FOLDER or module:callable.", callback=_model_name
    ),
]
Images = Annotated[Path, typer.Option(help="Folder of images.", exists=True, file_okay=False)]
OptionalImages = Annotated[Path | None, typer.Option(help="Folder of images.", exists=True, file_okay=False)]
Checkpoint = Annotated[
    Path | None, typer.Option(help="State dict: .safetensors, or .pt/.pth of tensors only.", exists=True)
]
Pretrained = Annotated[
    bool | None,
    typer.Option("--pretrained/--random", help="The library's weights (may download), or random ones."),
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Outputs of the classifier, where not the library's.")
]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Input height and width, where not the model's own.")
]
Mean = Annotated[
    str | None,
    typer.Option(help="Mean of each channel, 0.5,0.5,0.5; else the model's.", callback=with_commas),
]
Std = Annotated[
    str | None,
    typer.Option(help="Standard deviation of each channel; else the model's.", callback=with_commas),
]
Weights = Annotated[
    Path, typer.Option(help="Quantized weights, from `quantize`.", exists=True, dir_okay=False)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file, too.", callback=file_to_write())
]


@app.command()
def quantize(
    model: ModelName,
    images: Images,
    out: Annotated[
        Path, typer.Option(help="File to write, .safetensors.", callback=file_to_write(".safetensors"))
    ],
    count: Annotated[int, typer.Option(min=1, help="Calibration images.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Which of the images.")] = 0,
    w_bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of weights.")] = 4,
    a_bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of activations.")] = 4,
    recipe: Annotated[str, typer.Option(help=", ".join(RECIPE_NAMES), callback=_recipe)] = "repqvit",
    percentiles: Annotated[
        str | None,
        typer.Option(
            help="Ends of activation ranges to try; 0.999,0.9999,0.99999 if not given, 1 keeps outliers.",
            callback=with_commas,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
) -> None:
    """Quantize a model on a few training images (train/ of the folder where it has that).

    Several batches are calibrated as one, with less memory. The files used are recorded beside OUT, in
    OUT.json.
    """
    with command.warnings_in_one_line():
        from repqvit import images as image_files
        from repqvit.evaluation import float_bytes
        from repqvit.quantized import quantize as quantize_model
        from repqvit.recipes import named

        settings = named(recipe, w_bits, a_bits)
        if percentiles:
            settings = replace(settings, search=_search(settings.search, percentiles))

        source = _source(
            model, checkpoint, pretrained, num_classes, image_size, mean, std, needs_weights=True
        )
        source.model.to(command.usable_device(device))
        chosen = image_files.calibration_files(images, count, seed)
        calibration = [batch for batch, _ in image_files.batches(chosen, source.preprocessing, batch_size)]
        begin = time.perf_counter()
        with _status(f"calibrating on {len(chosen.files)} images"):
            quantized = quantize_model(source.model, calibration, settings)
        seconds = time.perf_counter() - begin
        before = float_bytes(source.model)
        quantized.save(out)
    summary = {
        "model": model,
        "weights": source.weights,
        "recipe": recipe,
        "percentiles": list(settings.search.percentiles),
        "w_bits": w_bits,
        "a_bits": a_bits,
        "sites": len(quantized.report.sites),
        "sites_changed": len(quantized.report.changed_sites),
        "obstacles": {site.norm: site.obstacle for site in quantized.report.sites if site.obstacle},
        "mean_sqnr_db": {role: _mean_sqnr(quantized, role) for role in ("weight", "activation")},
        "bytes_before": before,
        "bytes_after": out.stat().st_size,
        "calibration_seconds": seconds,
        "preprocessing": _plain(source.preprocessing.description),
        "calibration": chosen.record(),
    }
    files.write_json(out.with_name(out.name + ".json"), summary)
    _print_summary(summary, quantized)


def _search(search: repqvit.ranges.RangeSearch, percentiles: str) -> repqvit.ranges.RangeSearch:
    if search.kind not in ("percentile-mse", "percentile"):
        raise InputError(
            f"the recipe searches ranges by {search.kind}, not by percentiles", field="percentiles"
        )
    try:
        return replace(search, percentiles=tuple(float(part) for part in percentiles.split(",")))
    except ValueError as error:
        raise InputError(str(error), field="percentiles") from error


def _print_summary(summary: dict[str, Any], quantized: repqvit.quantized.QuantizedModel) -> None:
    form = quantized.report.recipe.norm
    table = Table(
        "quantized", f"{summary['model']}, W{summary['w_bits']}A{summary['a_bits']} {summary['recipe']}"
    )
    table.add_row(f"LayerNorm sites {form}", f"{summary['sites_changed']} of {summary['sites']}")
    for norm, obstacle in summary["obstacles"].items():
        table.add_row(f"  {norm}", f"plain per tensor: {obstacle}")
    for role, decibels in summary["mean_sqnr_db"].items():
        table.add_row(f"mean SQNR of {role}s", _decibels(decibels))
    before, after = summary["bytes_before"], summary["bytes_after"]
    table.add_row("bytes before", f"{before:,}")
    table.add_row("bytes after", f"{after:,} ({after / before:.3f}x)")
    table.add_row("calibration", f"{summary['calibration_seconds']:.1f} s")
    command.print_table(table)


@app.command(name="eval")
def evaluate(
    model: ModelName,
    weights: Weights,
    images: Images,
    batch_size: BatchSize = 32,
    labels: Annotated[bool, typer.Option(help="Class folders are labels.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images.")] = 2,
    device: Device = "auto",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    json: Json = None,
) -> None:
    """Compare a quantized model with the floating-point one on a folder (val/ of it where it has that).

    Without --checkpoint, --pretrained or a local transformers folder there is no floating-point model to
    compare with, and only the quantized one is measured.
    """
    with command.warnings_in_one_line():
        from repqvit import images as image_files
        from repqvit.evaluation import evaluate as evaluate_model
        from repqvit.evaluation import float_bytes, latency, logits_of

        source = _source(model, checkpoint, pretrained, num_classes, image_size, mean, std)
        quantized = _loaded(source, weights)
        reference = source.model if source.weights else None
        for each in (quantized, source.model):
            each.to(command.usable_device(device))
        data = image_files.evaluation_files(images, labels)
        one = image_files.read_image(data.files[0], source.preprocessing)[None]
        outputs = logits_of(_without_gradients(quantized, one)).shape[-1]
        data = image_files.with_model_labels(data, outputs, source.class_numbers)
        found = evaluate_model(
            quantized,
            image_files.batches(data, source.preprocessing, batch_size, workers),
            reference,
            progress=True,
            batches=math.ceil(len(data.files) / batch_size),
        )
        times = latency([source.model, quantized], one)
    names = ("fp32", "quantized")
    numbers = {
        "model": model,
        "images": found.images,
        "labelled": bool(found.accuracy),
        "accuracy": {
            name: a for name, a in zip(names, (found.reference_accuracy, found.accuracy), strict=True) if a
        },
        "agreement": found.agreement,
        "sqnr_db": _finite(found.sqnr_db),
        "bytes": {"fp32": float_bytes(source.model), "quantized": weights.stat().st_size},
        "latency_ms": {
            name: {"p50": t.p50_ms, "p90": t.p90_ms} for name, t in zip(names, times, strict=True)
        },
    }
    table = Table(f"{found.images} images", *names)
    for key in found.accuracy:
        table.add_row(key, *(_percent(part.get(key)) for part in (found.reference_accuracy, found.accuracy)))
    if reference is not None:
        table.add_row("agreement with fp32", "", _percent(found.agreement))
        table.add_row("SQNR of the outputs", "", _decibels(found.sqnr_db))
    table.add_row("bytes", *(f"{size:,}" for size in numbers["bytes"].values()))
    table.add_row("ms an image, p50 / p90", *(f"{t.p50_ms:.1f} / {t.p90_ms:.1f}" for t in times))
    command.print_table(table)
    print("The quantized column simulates integers in floating point: export the model to measure its speed.")
    if json:
        files.write_json(json, numbers)


@app.command()
def export(
    model: ModelName,
    weights: Weights,
    out: Annotated[Path, typer.Option(help="File to write, .onnx.", callback=file_to_write(".onnx"))],
    softmax: Annotated[
        str,
        typer.Option(
            help="float: as fast as can be; exact: with the logarithmic quantizer.",
            callback=lambda v: _softmax(v),
        ),
    ] = "float",
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with images, on which the file is compared with the simulated model."),
    ] = None,
) -> None:
    """Write a quantized model as ONNX with QDQ nodes, for integer arithmetic in onnxruntime and others."""
    with command.warnings_in_one_line():
        import torch

        from repqvit.images import batches, evaluation_files
        from repqvit.onnx_export import compare_onnx, export_onnx

        source = _source(model, None, None, num_classes, image_size, mean, std)
        quantized = _loaded(source, weights)
        size = source.preprocessing.image_size
        if size is None:
            raise InputError("the model takes images of any size: say which", field="image-size")
        form: Any = softmax  # checked by the option
        channels = 1 if source.preprocessing.mode == "L" else 3
        sample = None
        if images:  # before the export: a folder that cannot be read should not cost one
            files_ = evaluation_files(images, labelled=False)
            sample, _ = next(iter(batches(files_, source.preprocessing, 32)))
        with _status("exporting"):
            export_onnx(quantized, out, torch.zeros(1, channels, *size), "qdq", form)
    table = Table("exported", str(out))
    table.add_row("bytes of the quantized weights", f"{weights.stat().st_size:,}")
    table.add_row("bytes of the ONNX file", f"{out.stat().st_size:,}")
    table.add_row("softmax", softmax)
    if sample is not None:
        with _status("comparing"):
            found = compare_onnx(quantized, out, sample)
        table.add_row(
            f"top-1 agreement with the simulation, {len(sample)} images", _percent(found.top1_agreement)
        )
        table.add_row(
            "largest difference of an output", f"{found.max_difference:.3g} of {found.max_output:.3g}"
        )
    command.print_table(table)


def _softmax(value: str) -> str:
    if value not in ("float", "exact"):
        raise typer.BadParameter(f"expected float or exact, got {value!r}")
    return value


@app.command()
def inspect(
    model: ModelName,
    weights: Weights,
    images: OptionalImages = None,
    count: Annotated[int, typer.Option(min=1, help="Images to look at.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Which of the images.")] = 0,
    histograms: Annotated[
        Path | None,
        typer.Option(help="Folder for a picture of each LayerNorm's channel ranges.", file_okay=False),
    ] = None,
    device: Device = "auto",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
) -> None:
    """Show every quantized tensor, the LayerNorm sites, and with --images each layer's error."""
    if histograms and not images:
        raise InputError("--histograms needs --images to take the ranges from")
    with command.warnings_in_one_line():
        from repqvit import images as image_files
        from repqvit import inspection
        from repqvit.evaluation import compare

        needs_weights = images is not None
        source = _source(model, checkpoint, pretrained, num_classes, image_size, mean, std, needs_weights)
        quantized = _loaded(source, weights)
        command.print_table(_tensor_table(quantized))
        command.print_table(_site_table(quantized))
        if images is None:
            return
        for each in (quantized, source.model):
            each.to(command.usable_device(device))
        chosen = image_files.calibration_files(images, count, seed)
        batch, _ = next(iter(image_files.batches(chosen, source.preprocessing, count)))
        table = Table("output of", "kind", "SQNR dB", "cosine")
        for layer in compare(source.model, quantized, batch):
            table.add_row(layer.name, layer.kind, f"{layer.sqnr_db:.1f}", f"{layer.cosine:.4f}")
        command.print_table(table)
        if histograms:
            drawn = inspection.draw_norms(
                inspection.compare_norms(source.model, quantized, batch), histograms
            )
            print(f"{len(drawn)} pictures in {histograms}")


def _tensor_table(quantized: repqvit.quantized.QuantizedModel) -> Table:
    from repqvit.inspection import tensor_rows

    table = Table("layer", "tensor", "bits", "quantizer", "scales", "scale", "zero point", "SQNR dB")
    for row in tensor_rows(quantized):
        scale, zero_point = _range(row.scale, ".3g"), _range(row.zero_point, "g")
        decibels = "" if math.isnan(row.sqnr_db) else f"{row.sqnr_db:.1f}"
        table.add_row(
            row.name, row.role, str(row.bits), row.form, str(row.scales), scale, zero_point, decibels
        )
    return table


def _site_table(quantized: repqvit.quantized.QuantizedModel) -> Table:
    form = quantized.report.recipe.norm
    table = Table("LayerNorm site", "read by", "form")
    for site in quantized.report.sites:
        table.add_row(
            site.norm,
            ", ".join(site.linears),
            f"plain per tensor: {site.obstacle}" if site.obstacle else form,
        )
    return table


@app.command()
def prove(
    out: ProofFolder = Path("runs/repqvit"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Show on embedded data whether the paper's claim holds; exit code 0 where it does, 1 where not."""
    from repqvit.proof import prove as run_proof

    raise typer.Exit(run_proof(out, seeds, quick))


def _source(
    model: str,
    checkpoint: Path | None,
    pretrained: bool | None,
    num_classes: int | None,
    image_size: int | None,
    mean: str | None,
    std: str | None,
    needs_weights: bool = False,
) -> repqvit.sources.Source:
    from repqvit.sources import ModelSpec, load_model

    values = [
        None if text is None else tuple(float(part) for part in text.split(",")) for text in (mean, std)
    ]
    kind = None if pretrained is None else "pretrained" if pretrained else "random"
    spec = ModelSpec(model, kind, checkpoint, num_classes, image_size, *values)
    with _status(f"loading {model}"):
        source = load_model(spec)
    if needs_weights and not source.weights:
        raise InputError(
            "which weights? give --checkpoint FILE, --pretrained (may download) or --random", value=model
        )
    return source


def _loaded(source: repqvit.sources.Source, weights: Path) -> repqvit.quantized.QuantizedModel:
    from repqvit.checkpoint import load

    return load(source.model, weights)


def _without_gradients(model: repqvit.quantized.QuantizedModel, pixels: Any) -> Any:
    import torch

    from repqvit.evaluation import evaluating, forward

    with torch.no_grad(), evaluating(model):
        return forward(model, pixels)


def _status(text: str) -> Any:
    return Console(stderr=True).status(text)


def _mean_sqnr(quantized: repqvit.quantized.QuantizedModel, role: str) -> float | None:
    values = [
        row.sqnr_db
        for row in quantized.report.layers
        if (row.role == "weight") == (role == "weight") and math.isfinite(row.sqnr_db)
    ]
    return sum(values) / len(values) if values else None


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: outputs without any difference have null."""
    return value if value is not None and math.isfinite(value) else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _range(ends: tuple[float, float], form: str) -> str:
    low, high = (format(end, form) for end in ends)
    return low if low == high else f"{low} .. {high}"
