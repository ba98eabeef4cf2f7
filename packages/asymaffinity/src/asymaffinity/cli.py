"""The command `asymaffinity`: train from boxes, evaluate, predict, look at edges and at a run, prove."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from asymaffinity.settings import AFFINITIES, Settings
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
    help="Instance masks learned from boxes, with colour and depth (AsyInst, BoxInst).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command, with the exit codes 0, 1 (prove: a claim does not hold) and 2 (bad input)."""
    command.run(app)


Data = Annotated[Path, typer.Option(help="A COCO JSON file with boxes, or the folder of Cityscapes.")]
ImagesOption = Annotated[
    Path | None,
    typer.Option("--images", help="COCO: the folder of the images; else beside the file.", file_okay=False),
]
DepthFolder = Annotated[
    Path | None,
    typer.Option("--depth", help="COCO: folder of depth maps with the images' stems.", file_okay=False),
]
DepthKind = Annotated[
    str | None,
    typer.Option(help="What their numbers mean: kitti, cityscapes, metres, disparity, inverse_depth, ..."),
]
Out = Annotated[Path, typer.Option(help="Folder of the run.", callback=folder_to_write)]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the numbers to this file.", callback=file_to_write())
]


@app.command()
def train(
    data: Data,
    out: Out,
    images: ImagesOption = None,
    depth: DepthFolder = None,
    depth_kind: DepthKind = None,
    head: Annotated[
        str | None, typer.Option(help="condinst or maskrcnn.", callback=one_of("condinst", "maskrcnn"))
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="resnet50, another ResNet, small, or module:callable.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The backbone's weights, .safetensors or .pth.", dir_okay=False)
    ] = None,
    affinity: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(AFFINITIES)}.", callback=one_of(*AFFINITIES))
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="asymmetric, or symmetric (BoxInst).", callback=one_of("asymmetric", "symmetric")),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step, of all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, order and augmentation.")] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="no, fp16 or bf16.", callback=one_of("no", "fp16", "bf16"))
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of any other setting; may be repeated.")
    ] = None,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT, where there is one.")
    ] = False,
) -> None:
    """Train a detector with masks from boxes alone.

    For several processes: accelerate launch -m asymaffinity train ...
    """
    options = locals()
    named = (
        "data", "images", "depth", "depth_kind", "head", "backbone", "weights", "affinity", "form", "steps",
        "batch_size", "lr", "seed", "mixed_precision",
    )  # fmt: skip
    given = {name: options[name] for name in named if options[name] is not None}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    asked = Settings(**{**given, **command.assigned(settings or [], Settings)})
    with command.warnings_in_one_line():
        from asymaffinity import training
        from asymaffinity.checkpoints import CHECKPOINT
        from asymaffinity.datasets import first_depth

        files.check_no_run(out / CHECKPOINT, resume)
        boxes = training.load_data(asked)
        for what, count in boxes.skipped.items():
            print(f"left out: {count} {what}")
        if (words := first_depth(boxes)) is not None:
            print(f"depth: {words}")
        model = training.build_model(asked, len(boxes.classes))
        with progress_bar("training", asked.steps) as step:
            trained = training.train(
                model,
                boxes,
                asked,
                folder=out,
                resume=resume,
                device=command.usable_device(device),
                progress=step,
            )
    if main_process():
        last = trained.history[-1] if trained.history else {}
        shown = {name: f"{value:.4f}" for name, value in last.items() if isinstance(value, float)}
        _table(f"{asked.head}, {asked.affinity}, {asked.form}", {**shown, "model": str(out)})


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", exists=True)],
    data: Data,
    images: ImagesOption = None,
    split: Annotated[str, typer.Option(help="Cityscapes: val or train.")] = "val",
    predictions: Annotated[
        Path | None, typer.Option(help="Write COCO results to this file.", dir_okay=False)
    ] = None,
    cityscapes_results: Annotated[
        Path | None, typer.Option(help="Write results as Cityscapes' server reads them.", file_okay=False)
    ] = None,
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Mask and box AP (masks need true ones in the file), and how the masks sit in their boxes.

    On Cityscapes its own AP beside COCO's.
    """
    if cityscapes_results is not None and not data.is_dir():
        raise InputError("is for the folder of Cityscapes", field="cityscapes-results", value=str(data))
    with command.warnings_in_one_line():
        from asymaffinity import cityscapes, datasets
        from asymaffinity import predictions as predicted
        from asymaffinity.checkpoints import load_model

        loaded = load_model(model)
        if data.is_dir():
            boxes = datasets.cityscapes_boxes(data, split, depth=False, keep_empty=True)
            truth = predicted.cityscapes_truth(boxes, data, split)
        else:
            boxes = datasets.coco_boxes(data, images or data.parent, keep_empty=True)
            truth = predicted.read_json(data)
        if boxes.classes != loaded.classes:
            raise InputError(
                f"expected the classes of the model, {', '.join(loaded.classes)}",
                file=data,
                value=", ".join(boxes.classes),
            )
        with progress_bar("images", len(boxes)) as step:
            scores, made = predicted.evaluate(
                loaded, boxes, truth, device=command.usable_device(device), progress=step
            )
        if data.is_dir():
            scores |= cityscapes.score_rows(made, boxes, data, split)
    if predictions is not None:
        files.write_json(predictions, made)
    if cityscapes_results is not None:
        cityscapes.write_results(made, boxes, cityscapes_results)
    if json is not None:
        files.write_json(json, scores)
    note = {} if "mask_ap" in scores else {"mask_ap": "the file has no true masks"}
    _table(f"{len(boxes)} images", {**note, **{k: f"{v:.4f}" for k, v in scores.items()}})


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", exists=True)],
    images: Annotated[Path, typer.Argument(help="An image, or a folder of images.", exists=True)],
    out: Annotated[
        Path, typer.Option(help="Folder of predictions.json and the pictures.", callback=folder_to_write)
    ],
    score: Annotated[float, typer.Option(min=0, max=1, help="Least score.")] = 0.3,
    device: Device = "auto",
) -> None:
    """Masks of images: COCO run lengths in predictions.json, and a picture of each."""
    from asymaffinity import predictions as predicted
    from asymaffinity.checkpoints import load_model
    from asymaffinity.datasets import read_image

    loaded = load_model(model)
    chosen = predicted.image_files(images)
    place = command.usable_device(device)
    loaded.model.to(place)
    out.mkdir(parents=True, exist_ok=True)
    made, names = [], {}
    with progress_bar("images", len(chosen)) as step:
        for n, file in enumerate(chosen):
            image = read_image(file)
            found = predicted.detect(loaded.model, [image], place)[0]
            sure = found["scores"] >= score
            found = {key: value[sure] for key, value in found.items()}
            made += predicted.rows(found, n + 1, loaded.category_ids)
            names[n + 1] = file.name
            words = [
                f"{loaded.classes[label - 1]} {value:.2f}"
                for label, value in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
            ]
            picture = predicted.overlay(
                predicted.bytes_of(image), list(found["masks"].numpy()), found["boxes"].tolist(), words
            )
            predicted.save_png(picture, out / f"{file.stem}.png")
            step(n + 1)
    categories = [
        {"id": i, "name": name} for i, name in zip(loaded.category_ids, loaded.classes, strict=True)
    ]
    listed = [{"id": i, "file_name": name} for i, name in names.items()]
    files.write_json(
        out / "predictions.json", {"images": listed, "categories": categories, "annotations": made}
    )
    print(f"{len(made)} masks on {len(chosen)} images: {out}")


@app.command()
def pseudo(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", exists=True)],
    data: Annotated[Path, typer.Option(help="A COCO JSON file with boxes.", dir_okay=False)],
    out: Annotated[
        Path, typer.Option(help="COCO file to write, with masks.", callback=file_to_write(".json"))
    ],
    images: ImagesOption = None,
    iou: Annotated[float, typer.Option(min=0, max=1, help="Least overlap of a detection with a box.")] = 0.5,
    device: Device = "auto",
) -> None:
    """Masks for boxed images, as a COCO file for any other trainer."""
    from asymaffinity import predictions as predicted
    from asymaffinity.checkpoints import load_model
    from asymaffinity.datasets import coco_boxes

    loaded = load_model(model)
    boxes = coco_boxes(data, images or data.parent)
    if boxes.classes != loaded.classes:
        raise InputError(f"expected the classes of the model, {', '.join(loaded.classes)}", file=data)
    made, without = predicted.pseudo_masks(loaded, boxes, least_iou=iou, device=command.usable_device(device))
    content = predicted.read_json(data)
    files.write_json(out, {**content, "annotations": made})
    print(f"{len(made)} masks, {without} boxes that no detection fits: {out}")


@app.command()
def edges(
    image: Annotated[Path, typer.Argument(help="An image.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.", callback=folder_to_write)],
    depth: Annotated[Path | None, typer.Option(help="Its depth map.", exists=True, dir_okay=False)] = None,
    depth_kind: DepthKind = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="color_theta, depth_thresh, ...: as in train.")
    ] = None,
) -> None:
    """What an affinity keeps and breaks in an image: choose thresholds by it before training."""
    from dataclasses import replace

    from asymaffinity import depth as depth_maps
    from asymaffinity import predictions as predicted
    from asymaffinity.affinity import DepthGradAffinity, similarity_quantiles
    from asymaffinity.batches import resize_field
    from asymaffinity.datasets import read_image
    from asymaffinity.training import build_criterion

    chosen = {
        **command.assigned(settings or [], Settings),
        "affinity": "both" if depth is not None else "color",
    }
    asked = replace(Settings(str(image)), **chosen)
    criterion = build_criterion(asked)
    pixels = read_image(image)
    out.mkdir(parents=True, exist_ok=True)
    field = None
    if depth is not None:
        stated = depth_maps.sidecar(depth.parent) if depth_kind is None else depth_maps.convention(depth_kind)
        if stated is None:
            stated = depth_maps.convention("")
        import torch

        numbers = depth_maps.read_field(depth, stated, asked.depth_field)
        field = resize_field(torch.from_numpy(numbers), (pixels.shape[1], pixels.shape[2]))
        print(f"depth: {depth_maps.describe(depth_maps.read_numbers(depth), stated)}")
    for name, (affinity, _) in criterion.affinities.items():
        if isinstance(affinity, DepthGradAffinity):
            assert field is not None
            found, features = affinity(field[None]), affinity.features(field[None])[0]
        else:
            found, features = affinity(pixels[None]), affinity.features(pixels[None])
        low, half, high = similarity_quantiles(features, affinity.theta, affinity.kernel, affinity.dilation)
        picture = predicted.edge_picture(predicted.bytes_of(pixels), found)
        file = out / f"{image.stem}_{name}.png"
        predicted.save_png(picture, file)
        print(
            f"{name}: {found.share():.1%} of edges kept at {affinity.thresh:g}; similarity {low:.3f}, "
            f"{half:.3f}, {high:.3f} at the 10th, 50th and 90th percentile: {file}"
        )


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.", exists=True)], json: Json = None
) -> None:
    """How the masks of a run sat in their boxes over training: fill, and the share of trivial masks."""
    file = run / "log.jsonl"
    if not file.is_file():
        raise InputError("there is no log.jsonl: expected the folder of a training run", file=run)
    try:
        history = [json_module.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"is damaged: {error}", file=file) from error
    known = [entry for entry in history if "masks/fill" in entry]
    if not known:
        raise InputError("has no step with a mask yet", file=file)
    from rich.table import Table

    names = ("fill", "full", "empty", "leaking", "trivial")
    table = Table("step", "loss", *names, title=f"masks in their boxes, {run}")
    for entry in known[:: max(1, len(known) // 20)]:
        shares = [f"{entry[f'masks/{name}']:.3f}" for name in names]
        table.add_row(str(entry["step"]), f"{entry['loss']:.3f}", *shares)
    command.print_table(table)
    if json is not None:
        files.write_json(json, known)


@app.command()
def prove(
    out: ProofFolder = Path("runs/asymaffinity"),
    seeds: Seeds = 3,
    quick: Quick = False,
) -> None:
    """Train symmetric and asymmetric losses from boxes alone on scenes of real pictures, and judge."""
    with command.warnings_in_one_line():
        from asymaffinity.proof import prove as run

        raise typer.Exit(run(out, seeds=seeds, quick=quick))


def _table(title: str, entries: dict[str, str]) -> None:
    from rich.table import Table

    table = Table("", "", title=title, show_header=False)
    for name, value in entries.items():
        table.add_row(name, value)
    command.print_table(table)
