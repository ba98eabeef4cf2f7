import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from repqvit import checkpoint, cli, recipes
from shared_core import testing

MODEL = ["--model", "timm/test_vit", "--num-classes", "2", "--image-size", "32"]
RANDOM = [*MODEL, "--random"]


run = partial(testing.exit_code, cli.app)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def weights(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "q.safetensors"
    assert run("quantize", *RANDOM, "--images", data, "--out", out, "--count", 10, "--batch-size", 4) == 0
    return out


def test_help_and_wrong_arguments_answer_without_torch(tmp_path: Path):
    code = """
import sys
from shared_core import command
from repqvit import cli
for arguments in (
    ["--help"],
    ["quantize", "--help"],
    ["quantize", "--model", "resnet", "--images", ".", "--out", "x.safetensors"],
    ["quantize", "--model", "timm/x", "--images", ".", "--out", "x.safetensors", "--recipe", "none"],
    ["export", "--model", "timm/x", "--weights", "nowhere", "--out", "x.onnx"],
):
    try:
        command.run(cli.app, arguments)
    except SystemExit as ended:
        print("exit", ended.code)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert codes == ["exit 0", "exit 0", "exit 2", "exit 2", "exit 2"], done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in done.stderr


def test_the_recipes_in_the_help_are_those_there_are():
    assert list(cli.RECIPE_NAMES) == list(recipes.RECIPES)


def test_quantize_writes_weights_a_record_and_a_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "q.safetensors"
    options = ["--count", 12, "--w-bits", 6, "--seed", 3, "--percentiles", "0.999,1"]
    assert run("quantize", *RANDOM, "--images", data, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert "W6A4 repqvit" in printed
    assert "12 of 13" in printed
    assert f"{out.stat().st_size:,}" in printed
    record = json.loads((tmp_path / "q.safetensors.json").read_text())
    assert record["bytes_after"] == out.stat().st_size < record["bytes_before"] / 3
    assert record["percentiles"] == [0.999, 1.0]
    assert record["calibration"]["seed"] == 3
    assert len(set(record["calibration"]["files"])) == 12
    assert all((data / file).is_file() for file in record["calibration"]["files"])
    assert record["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


def test_several_batches_give_the_numbers_of_one(data: Path, weights: Path, tmp_path: Path):
    whole = tmp_path / "whole.safetensors"
    assert run("quantize", *RANDOM, "--images", data, "--out", whole, "--count", 10, "--batch-size", 10) == 0
    model = cli._source("timm/test_vit", None, False, 2, 32, None, None).model
    first, second = (checkpoint.load(model, path) for path in (whole, weights))
    scales = [
        torch.cat([t.flatten() for name, t in sorted(each.state_dict().items()) if name.endswith("scale")])
        for each in (first, second)
    ]
    assert torch.allclose(*scales, rtol=1e-4)


def test_eval_compares_with_the_floating_point_model(
    data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    numbers = tmp_path / "eval.json"
    code = run("eval", *RANDOM, "--weights", weights, "--images", data, "--batch-size", 4, "--json", numbers)
    assert code == 0
    printed = capsys.readouterr().out
    for expected in ("6 images", "top1", "agreement with fp32", "SQNR of the outputs", "p50 / p90"):
        assert expected in printed
    found = json.loads(numbers.read_text())
    assert found["images"] == 6
    assert found["labelled"]
    assert set(found["accuracy"]) == {"fp32", "quantized"}
    assert 0 <= found["agreement"] <= 1
    assert found["bytes"]["quantized"] == weights.stat().st_size


@pytest.mark.parametrize("labels", [True, False])
def test_eval_measures_what_weights_and_labels_allow(data: Path, weights: Path, tmp_path: Path, labels: bool):
    numbers = tmp_path / "eval.json"
    # Without floating-point weights nothing to agree with, without labels no accuracy.
    arguments = MODEL if labels else [*RANDOM, "--no-labels"]
    assert run("eval", *arguments, "--weights", weights, "--images", data, "--json", numbers) == 0
    found = json.loads(numbers.read_text())
    assert found["labelled"] == labels
    assert (found["agreement"] is None) == labels
    assert set(found["accuracy"]) == ({"quantized"} if labels else set())


OWN = """
import timm

def make():
    return timm.create_model("test_vit", depth=1, img_size=32, num_classes=2)
"""


def test_ones_own_model_from_quantization_to_histograms(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)  # a module in the working directory is found
    monkeypatch.setattr(sys, "path", sys.path.copy())
    model = ["--model", "own_models:make"]
    assert run("quantize", *model, "--images", data, "--out", "q.safetensors", "--count", 8) == 0
    arguments = ["--weights", "q.safetensors", "--images", data, "--histograms", "pictures"]
    assert run("inspect", *model, *arguments) == 0
    printed = capsys.readouterr().out
    for expected in ("LogSqrt2", "blocks.0.mlp.fc2", "token selection before the linear layer", "cosine"):
        assert expected in printed
    assert "2 pictures in pictures" in printed
    with Image.open(tmp_path / "pictures/blocks.0.norm1.png") as picture:
        assert picture.width == 1200
    sys.modules.pop("own_models")


def test_inspect_needs_no_weights_for_the_table(weights: Path, capsys: pytest.CaptureFixture[str]):
    assert run("inspect", *MODEL, "--weights", weights) == 0
    assert "cosine" not in capsys.readouterr().out


def test_export_writes_an_onnx_file(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    onnx_export = pytest.importorskip("repqvit.onnx_export")
    calls = []

    def export_onnx(quantized: object, path: Path, sample: torch.Tensor, form: str, softmax: str) -> None:
        calls.append((tuple(sample.shape), form, softmax))
        path.write_bytes(b"onnx")

    # What the file computes is tested with the exporter; here, what the command asks of it.
    monkeypatch.setattr(onnx_export, "export_onnx", export_onnx)
    assert (
        run("export", *MODEL, "--weights", weights, "--out", tmp_path / "q.onnx", "--softmax", "exact") == 0
    )
    assert calls == [((1, 3, 32, 32), "qdq", "exact")]


@pytest.mark.parametrize("code", [0, 1])
def test_prove_ends_with_the_verdict(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    proof = ModuleType("repqvit.proof")
    calls = []
    proof.prove = lambda *arguments: calls.append(arguments) or code  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "repqvit.proof", proof)
    assert run("prove", "--out", tmp_path, "--seeds", 2, "--quick") == code
    assert calls == [(tmp_path, 2, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize", *MODEL, "--images", "{data}", "--out", "{out}"],
            "which weights? give --checkpoint FILE",
        ),
        (["quantize", *RANDOM, "--images", "{data}/nowhere", "--out", "{out}"], "does not exist"),
        (
            ["quantize", *RANDOM, "--images", "{data}", "--out", "{out}", "--w-bits", "9"],
            "invalid value for '--w-bits'",
        ),
        (
            ["quantize", *RANDOM, "--images", "{data}", "--out", "x.bin"],
            "a file name that ends in .safetensors",
        ),
        (["quantize", *RANDOM, "--images", "{data}", "--out", "{out}", "--mean", "a,b"], "expected numbers"),
        (["quantize", *RANDOM, "--images", "{data}", "--out", "{out}", "--device", "tpu9"], "no such device"),
        (["quantize", *RANDOM, "--images", "{data}", "--out", "{out}", "--percentiles", "99"], "in (0.5, 1]"),
        (
            [
                "quantize",
                *RANDOM,
                "--images",
                "{data}",
                "--out",
                "{out}",
                "--percentiles",
                "1",
                "--recipe",
                "mse",
            ],
            "the recipe searches ranges by mse",
        ),
        (
            ["quantize", *RANDOM, "--images", "{data}", "--out", "{data}/no/x.safetensors"],
            "there is no folder",
        ),
        (["inspect", *RANDOM, "--weights", "{weights}", "--histograms", "h"], "--histograms needs --images"),
        (["export", *RANDOM, "--weights", "{weights}", "--out", "x.onnx"], "No such option"),
        (["eval", *RANDOM, "--weights", "{data}/train/cat/0.png", "--images", "{data}"], "safetensors"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    data: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    places = {"data": data, "weights": weights, "out": tmp_path / "q.safetensors"}
    capsys.readouterr()
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error:")]) == 1
    assert message.lower() in errors[-1].lower()
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_one_line_on_stderr(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "q.safetensors"
    assert run("quantize", *RANDOM, "--images", data, "--out", out, "--count", 99, "--batch-size", 99) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == [f"warning: {data} has 12 images, fewer than the 99 asked for"]
