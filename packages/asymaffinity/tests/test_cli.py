"""The command, from a user's folder to masks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from asymaffinity import cli
from asymaffinity.datasets import cityscapes_boxes
from asymaffinity.predictions import cityscapes_truth, decode, score
from shared_core.testing import exit_code

# accelerate's and tensorboard's own use of deprecated calls; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SMALL = (
    "--backbone", "small", "--steps", "4", "--batch-size", "2", "--lr", "0.001", "--device", "cpu",
    "--set", "min_size=64", "--set", "max_size=64", "--set", "workers=0", "--set", "log_every=2",
    "--set", "optimizer=adamw",
)  # fmt: skip


def command(*arguments: object) -> int:
    return exit_code(cli.app, *arguments)


def test_a_coco_folder_trains_evaluates_predicts_and_is_diagnosed(tmp_path: Path, capsys):
    file = trees.coco(tmp_path, masks=True)
    out, images = tmp_path / "run", tmp_path / "images"
    common = ("--data", file, "--images", images)
    assert command("train", *common, "--depth", tmp_path / "depth", "--out", out, *SMALL) == 0
    said = capsys.readouterr().out
    assert "masks/trivial" in said
    assert "depth: street_000.png: disparity, median 1.5, range" in said
    again = ("train", *common, "--depth", tmp_path / "depth", "--out", out, *SMALL)
    assert command(*again) == 2
    assert "holds a run already; --resume goes on with it" in capsys.readouterr().err
    assert command(*again, "--resume") == 0

    numbers, results = tmp_path / "scores.json", tmp_path / "results.json"
    assert command("eval", out, *common, "--json", numbers, "--predictions", results, "--device", "cpu") == 0
    scores = json.loads(numbers.read_text())
    assert {"mask_ap", "mask_ap50", "box_ap", "fill", "trivial"} <= scores.keys()
    assert all(value >= 0 for value in scores.values())

    found = tmp_path / "found"
    assert command("predict", out, images, "--out", found, "--score", "0", "--device", "cpu") == 0
    content = json.loads((found / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [f"street_{n:03d}.png" for n in range(4)]
    for row in content["annotations"]:
        assert decode(row["segmentation"]).shape == (64, 64)
        assert row["category_id"] in (3, 7)
    with Image.open(found / "street_001.png") as picture:
        assert picture.size == (64, 64)

    masks = tmp_path / "pseudo.json"
    assert command("pseudo", out, *common, "--out", masks, "--iou", "0", "--device", "cpu") == 0
    made = json.loads(masks.read_text())
    assert made["categories"] == json.loads(file.read_text())["categories"]
    for row in made["annotations"]:
        x, y, _, h = row["bbox"]
        ys, xs = np.nonzero(decode(row["segmentation"]))
        if len(xs):
            assert xs.min() >= int(x)
            assert ys.max() <= y + h

    capsys.readouterr()
    assert command("diagnose", out, "--json", tmp_path / "history.json") == 0
    assert "trivial" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2


def test_true_masks_as_predictions_score_one(tmp_path: Path):
    root = trees.cityscapes(tmp_path, "val")
    data = cityscapes_boxes(root, "val", depth=False)
    truth = cityscapes_truth(data, root)
    assert len(truth["annotations"]) == 4
    rows = [{**row, "score": 0.9} for row in truth["annotations"]]
    assert score(truth, rows)["mask_ap"] == pytest.approx(1)
    assert score(truth, [])["mask_ap"] == 0
    boxes = [{**row, "segmentation": None} for row in truth["annotations"]]
    assert "mask_ap" not in score({**truth, "annotations": boxes}, rows)


def test_mask_rcnn_trains_on_cityscapes_by_colour(tmp_path: Path, capsys):
    root = trees.cityscapes(tmp_path)
    arguments = (
        "--data",
        root,
        "--out",
        tmp_path / "run",
        "--head",
        "maskrcnn",
        "--affinity",
        "color",
        *SMALL,
    )
    assert command("train", *arguments, "--steps", "1", "--batch-size", "1") == 0
    assert "left out: 1 images without a box" in capsys.readouterr().out


def test_edges_are_shown_before_training(tmp_path: Path, capsys):
    trees.coco(tmp_path, 1)
    image, depth = tmp_path / "images" / "street_000.png", tmp_path / "depth" / "street_000.png"
    assert command("edges", image, "--depth", depth, "--out", tmp_path / "e") == 0
    said = capsys.readouterr().out
    assert "depth: median" in said
    assert "of edges kept at 0.5" in said
    for name in ("color", "depthgrad"):
        with Image.open(tmp_path / "e" / f"street_000_{name}.png") as picture:
            assert picture.size == (64, 64)
            assert len(picture.getcolors(64 * 64)) > 20
    (tmp_path / "depth" / "depth.json").unlink()
    assert command("edges", image, "--depth", depth, "--out", tmp_path / "e") == 2
    assert "what the numbers mean must be stated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("train", "--data", "none.json", "--out", "x", "--affinity", "color"),
            "none.json: there is no such file",
        ),
        (("train", "--data", "none.json", "--out", "x"), "affinity both needs depth maps"),
        (("train", "--data", "a", "--out", "x", "--set", "lr=0"), "lr: expected a number above 0"),
        (("train", "--data", "a", "--out", "x", "--form", "both"), "expected one of asymmetric, symmetric"),
        (
            ("predict", ".", ".", "--out", "x"),
            "there is no config.json: expected the folder of a trained model",
        ),
        (("diagnose", "."), "there is no log.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_help_and_wrong_options_need_no_torch():
    code = (
        "import sys; from asymaffinity import cli; from shared_core.testing import exit_code\n"
        "codes = [exit_code(cli.app, 'train', '--help'), exit_code(cli.app, 'train', '--nothing')]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2] False"
