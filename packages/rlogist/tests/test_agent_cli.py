"""The agent's commands, from slides to judged predictions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from generated_slides import tissue_slide
from test_cli import run

TRAIN = ("--epochs", 2, "--batch", 4, "--steps", 64, "--width", 8, "--rho", 0.2, "--validation", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    (root / "slides").mkdir()
    rows = ["WSI_path,label"]
    for index in range(4):
        tissue_slide(root / "slides" / f"s{index}.tif", seed=index)
        rows.append(f"s{index}.tif,{'tumour' if index % 2 else 'normal'}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def test_extract_train_predict_evaluate_report(world, tmp_path, capsys):
    slides, labels = world / "slides", world / "labels.csv"
    options = ("--patch", 32, "--extractor", "stain", "--deep")
    assert run(capsys, "extract", slides, "--out", tmp_path / "f", *options)[0] == 0
    model = tmp_path / "m"
    code, shown, log = run(
        capsys, "train", tmp_path / "f", "--labels", labels, "--out", model, *TRAIN, "--tensorboard"
    )
    assert (code, "trained on 4 slides" in shown) == (0, True)
    assert [line.split(":")[0] for line in log.splitlines() if " 1 of " in line] == [
        f"stage {stage}" for stage in ("A", "B", "B2", "C")
    ]
    assert list((model / "tensorboard").glob("events*"))
    config = json.loads((model / "config.json").read_text())
    assert (config["classes"], config["fingerprint"]) == (["normal", "tumour"], "stain-1")

    code, _, errors = run(capsys, "train", tmp_path / "f", "--labels", labels, "--out", model, *TRAIN)
    assert (code, "holds a run already; --resume goes on with it" in errors) == (2, True)

    (world / "slides" / "broken.tif").write_bytes(b"II*\0" + b"\0" * 40)
    code, shown, errors = run(capsys, "predict", slides, "--model", model, "--out", tmp_path / "p", "--html")
    (world / "slides" / "broken.tif").unlink()
    assert (code, "1 of 5 slides failed" in errors) == (2, True)
    again = ("predict", slides, "--model", model, "--out", tmp_path / "p", "--html")
    (tmp_path / "p" / "s2.json").unlink()  # as if the run had been killed there
    (tmp_path / "p" / "s3.html").unlink()
    code, shown, _ = run(capsys, *again)
    assert (code, shown.count("kept")) == (0, 2)
    assert (tmp_path / "p" / "s2.json").exists()
    assert (tmp_path / "p" / "s3.html").exists()
    assert run(capsys, *again, "--rho", 0.5)[1].count("kept") == 0  # another question
    assert run(capsys, *again)[1].count("kept") == 0
    os.utime(slides / "s1.tif")  # another file
    assert run(capsys, *again)[1].count("kept") == 3
    found = json.loads((tmp_path / "p" / "s0.json").read_text())
    assert found["looks"] == len(found["path"]) == -(-found["regions"] // 5)
    assert sum(row["pixels"] for row in found["ledger"]["reads"] if row["purpose"] == "deep") == (
        found["looks"] * 16 * 32**2
    )
    assert (tmp_path / "p" / "s0.html").exists()

    code, shown, _ = run(capsys, "evaluate", tmp_path / "p", "--labels", labels, "--out", tmp_path / "e.json")
    assert code == 0
    judged = json.loads((tmp_path / "e.json").read_text())
    assert judged["slides"] == 4
    assert judged["auc_interval"][0] <= judged["auc"] <= judged["auc_interval"][1]
    assert judged["observation_ratio"] == pytest.approx(found["observation_ratio"])
    assert judged["deep_pixel_ratio"] == pytest.approx(found["observation_ratio"])
    page = tmp_path / "r.html"
    assert run(capsys, "report", slides / "s1.tif", "--model", model, "--out", page, "--exhaustive")[0] == 0
    assert "all regions at depth" in page.read_text()

    one_class = tmp_path / "one.csv"
    one_class.write_text(labels.read_text().replace("tumour", "normal"))
    code, _, errors = run(capsys, "evaluate", tmp_path / "p", "--labels", one_class)
    assert (code, "AUC is not defined" in errors) == (2, True)
    again = ("train", tmp_path / "f", "--labels", one_class, "--out", tmp_path / "n", *TRAIN)
    code, _, errors = run(capsys, *again)
    assert (code, "at least two classes" in errors) == (2, True)
    for rho in (0, 1.5):
        code, _, errors = run(
            capsys, "predict", slides, "--model", model, "--out", tmp_path / "q", "--rho", rho
        )
        assert (code, "expected a share of regions above 0" in errors) == (2, True)


def test_slides_are_read_at_the_magnifications_of_training(world, tmp_path, capsys):
    slides, model = world / "slides", tmp_path / "m"
    options = ("--patch", 32, "--extractor", "stain", "--deep", "--scan-mpp", 2, "--deep-mpp", 1)
    assert run(capsys, "extract", slides, "--out", tmp_path / "f", *options)[0] == 0
    train = ("train", tmp_path / "f", "--labels", world / "labels.csv", "--out", model, *TRAIN)
    assert run(capsys, *train)[0] == 0
    one = slides / "s0.tif"
    assert run(capsys, "predict", one, "--model", model, "--out", tmp_path / "p")[0] == 0
    found = json.loads((tmp_path / "p" / "s0.json").read_text())
    deep = sum(row["pixels"] for row in found["ledger"]["reads"] if row["purpose"] == "deep")
    assert deep == found["looks"] * 4 * 64**2  # 2 x 2 patches of 1 micron, read from the level of 0.5
    for option, value, words in (
        ("--deep-mpp", 0.5, "deep_mpp: expected 1"),
        ("--patch", 16, "patch: expected 32"),
    ):
        code, _, errors = run(
            capsys, "predict", one, "--model", model, "--out", tmp_path / "q", option, value
        )
        assert (code, f"{words}, with which the model was trained" in errors) == (2, True)


def test_a_model_reads_with_the_encoder_weights_of_its_features(world, tmp_path, capsys):
    from safetensors.torch import save_file

    from rlogist.extractors import load_extractor

    slides, model, weights = world / "slides", tmp_path / "m", tmp_path / "w.safetensors"
    save_file(load_extractor("timm/test_resnet", pretrained=False, seed=5).encoder.state_dict(), weights)
    options = ("--patch", 32, "--extractor", "timm/test_resnet", "--deep", "--weights", weights)
    assert run(capsys, "extract", slides, "--out", tmp_path / "f", *options)[0] == 0
    train = ("train", tmp_path / "f", "--labels", world / "labels.csv", "--out", model, *TRAIN)
    assert run(capsys, *train)[0] == 0
    predict = ("predict", slides / "s0.tif", "--model", model, "--out", tmp_path / "p")
    assert run(capsys, *predict, "--weights", weights)[0] == 0
    code, _, errors = run(capsys, *predict, "--random")
    assert (code, errors.count("\n")) == (2, 1)
    assert "was trained on features of timm/test_resnet" in errors


def test_features_without_deep_ones_are_told(world, tmp_path, capsys):
    options = ("--patch", 32, "--extractor", "stain")
    assert run(capsys, "extract", world / "slides", "--out", tmp_path / "f", *options)[0] == 0
    code, _, errors = run(
        capsys, "train", tmp_path / "f", "--labels", world / "labels.csv", "--out", tmp_path / "m", *TRAIN
    )
    assert code == 2
    assert "has no deep features: extract with --deep" in errors
