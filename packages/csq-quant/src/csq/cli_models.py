"""`csq harden`, `inspect`, `export` and `evaluate`: what is done with trained models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from csq.cli_options import Data, JsonFile, RunOrFile, percent
from shared_core import InputError, command, files
from shared_core.command import Device, file_to_write, one_of

if TYPE_CHECKING:
    import csq.runs


def harden(
    run: Annotated[Path, typer.Argument(help="Folder of `csq train`.", exists=True, file_okay=False)],
    out: Annotated[
        Path, typer.Option(help="File to write, .safetensors.", callback=file_to_write(".safetensors"))
    ],
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
            table.add_row("top-1 of the validation part, soft", percent(accuracy))
            table.add_row("top-1 of the validation part, hardened", percent(after))
            table.add_row("gap", f"{100 * (accuracy - after):+.2f} points")
        command.print_table(table)


def _save_float(model: Any, out: Path) -> None:
    from safetensors.torch import save_file

    with files.atomic_path(out) as temporary:
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()},
            temporary,
        )


def inspect(
    path: RunOrFile,
    png: Annotated[
        Path | None, typer.Option(help="Picture to write.", callback=file_to_write(".png", ".svg", ".pdf"))
    ] = None,
    json: JsonFile = None,
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
            title = f"{title}\n{scheme_view.sizes(report, operations, size)}"
            scheme_view.draw(png, report, title, history, target)
        if json:
            numbers = {**report.totals(), "file_bytes": size, "bit_operations": operations.total}
            files.write_json(json, {**numbers, "macs": operations.macs, "layers": report.rows()})


def _no_float(run: csq.runs.TrainingRun) -> None:
    if run.settings.method == "float":
        raise InputError("was trained in floating point: it has no scheme", file=run.folder)


def export(
    path: Annotated[Path, typer.Argument(help="File of `csq harden`.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="File to write, .onnx.", callback=file_to_write(".onnx"))],
    opset: Annotated[int, typer.Option(help="18 to 23; 4-bit weights need 21.")] = 21,
    wide: Annotated[
        str,
        typer.Option(
            help="For layers of 9 bits, which pass int8. auto: int16, or int32 below opset 21; raise: none.",
            callback=one_of("auto", "int16", "int32", "raise"),
        ),
    ] = "auto",
    data: Data = None,
) -> None:
    """Write a hardened model as ONNX with integer weights, and run it beside the model in onnxruntime.

    They are compared on test images of --data, else on noise.
    """
    with command.warnings_in_one_line():
        import torch

        import csq
        from csq.onnx_export import NARROW_OPSET, wide_layers
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
        wider = wide_layers(file.model)
    if wider:
        typer.echo(_cost(wider, 4 if wide == "int32" or opset < NARROW_OPSET else 2))
    table = Table("exported", str(out))
    table.add_row("bytes of the hardened file", f"{path.stat().st_size:,}")
    table.add_row("bytes of the ONNX file", f"{out.stat().st_size:,}")
    table.add_row(
        f"largest difference in onnxruntime, {len(sample)} {'images' if data else 'draws of noise'}",
        f"{difference:.3g} of {largest:.3g}",
    )
    command.print_table(table)


def _cost(wider: dict[str, int], width: int) -> str:
    """Which layers do not fit int8, and what that costs."""
    names, more = list(wider), f" and {len(wider) - 5} more" if len(wider) > 5 else ""
    return (
        f"{', '.join(names[:5])}{more}: 9 bits a weight, stored as int{8 * width}, which costs "
        f"{(width - 1) * sum(wider.values()):,} bytes over int8; they run as floats. "
        "csq train --n-bits 7 avoids it"
    )


def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders of `csq train`, files of `csq harden`.", exists=True)
    ],
    data: Data = None,
    device: Device = "auto",
    json: JsonFile = None,
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
    return [percent(row["top1"]), *bits, f"{row['bytes']:,}" if "bytes" in row else ""]
