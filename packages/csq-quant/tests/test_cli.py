from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import killed_at_a_checkpoint

import csq
from csq import cli, methods, runs, sources, stages
from csq.checkpoints import read_checkpoint
from csq.settings import Settings
from csq.training import CHECKPOINT
from shared_core import testing

SHORT = ["--image-size", 32, "--epochs", 2, "--batch-size", 12, "--lr", 0.05, "--device", "cpu"]

pytestmark = pytest.mark.filterwarnings(
    # A dozen steps are too few for a search; what is tested is not accuracy.
    "ignore:.*the search kept fewer",
    "ignore:hardened at temperature",
)


run = partial(testing.exit_code, cli.app)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: rows and columns of stripes, 36 to train on."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 18), ("val", 5), ("test", 6)):
        for label in ("columns", "rows"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                wave = np.tile([0, 180], 20)
                image = np.broadcast_to(wave if label == "columns" else wave[:, None], (40, 40))
                noisy = image[..., None] + generator.integers(0, 70, (40, 40, 3))
                Image.fromarray(noisy.astype(np.uint8)).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of CSQ at 7 planes, which fit int8, with 4-bit activations."""
    out = tmp_path_factory.mktemp("runs") / "small"
    options = ["--target-bits", 3, "--n-bits", 7, "--act-bits", 4]
    assert run("train", "--model", "csq/resnet8", "--data", data, "--out", out, *SHORT, *options) == 0
    return out


@pytest.fixture(scope="module")
def hardened(trained: Path) -> Path:
    out = trained.with_name("small.safetensors")
    assert run("harden", trained, "--out", out) == 0
    return out


def test_help_and_wrong_arguments_answer_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from shared_core import command
from csq import cli
for arguments in (
    ["--help"],
    ["train", "--help"],
    ["train", "--model", "resnet", "--data", ".", "--out", "r"],
    ["train", "--model", "timm/x", "--data", ".", "--out", "r", "--method", "none"],
    ["harden", "nowhere", "--out", "x.safetensors"],
    ["export", "nowhere", "--out", "x.onnx"],
):
    try:
        command.run(cli.app, arguments)
    except SystemExit as ended:
        print("exit", ended.code)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert codes == ["exit 0", "exit 0", "exit 2", "exit 2", "exit 2", "exit 2"], done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("model", "planes"), [("torchvision/squeezenet1_1", ["--n-bits", 7]), ("timm/test_resnet", [])]
)
def test_a_users_model_trains_hardens_shows_exports_and_is_evaluated(
    model: str, planes: list[object], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "run", tmp_path / "m.safetensors"
    options = ["--target-bits", 2.5, *planes, "--lr", 0.002]
    assert run("train", "--model", model, "--data", data, "--out", out, *SHORT, *options) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["average_bits"] == pytest.approx(2.5, rel=0.02)
    assert run("harden", out, "--out", file) == 0
    printed = capsys.readouterr().out
    for expected in ("paper bits", "stored bits", f"{file.stat().st_size:,} bytes", "soft", "gap"):
        assert expected in printed

    numbers = tmp_path / "numbers.json"
    assert run("inspect", file, "--png", tmp_path / "bits.png", "--json", numbers) == 0
    printed, found = capsys.readouterr().out, json.loads(numbers.read_text())
    for layer in found["layers"]:
        bar = "█" * layer["bits"] + "░" * (layer["stored_bits"] - layer["bits"])
        assert re.search(rf"{re.escape(layer['name'])} .* {layer['mask']} .* {bar} ", printed)
    assert f"{found['file_bytes']:,} bytes" in printed
    assert found["file_bytes"] == file.stat().st_size
    assert found["average_bits"] == report["average_bits"]
    assert found["bit_operations"] > found["macs"] > 0
    with Image.open(tmp_path / "bits.png") as picture:
        assert picture.width == 1200

    assert run("export", file, "--out", tmp_path / "m.onnx", "--data", data) == 0
    printed = capsys.readouterr().out
    hard_report = csq.report(runs.HardenedFile.open(file).model)
    wide = [layer.name for layer in hard_report.layers if int(layer.codes.abs().max()) > 128]
    assert bool(wide) == (not planes)  # eight planes are the default, and some layers here need them
    assert ("stored as int16" in printed) == bool(wide)
    assert all(name in printed for name in wide[:5])
    row = next(line for line in printed.splitlines() if "largest difference" in line)
    difference, _, largest = row.split("│")[2].split()
    assert float(difference) < 1e-3 * float(largest)

    assert run("evaluate", out, file, "--data", data, "--json", numbers) == 0
    soft, hard, from_file = json.loads(numbers.read_text())
    assert from_file["top1"] == hard["top1"]
    assert from_file["bytes"] == file.stat().st_size
    assert from_file["images"] == soft["images"] == 12


def test_the_file_has_the_runs_weights_activations_and_normalization(trained: Path, hardened: Path) -> None:
    opened = runs.HardenedFile.open(hardened)
    run_ = runs.TrainingRun.open(trained)
    images = run_.images()
    hard = run_.hard_model(images)
    x = images.inputs(images.test.read(torch.arange(4)))
    assert torch.equal(opened.model(x), hard(x))
    assert opened.images(str(run_.settings.data)).mean == images.mean
    quantizers = [n for n, _ in opened.model.named_modules() if n.endswith("input_quantizer")]
    assert len(quantizers) == len(csq.report(hard).layers)


def test_the_log_has_a_record_a_line_with_temperature_precision_and_validation(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert records == read_checkpoint(trained / CHECKPOINT).history
    assert [record["step"] for record in records] == list(range(1, 7))
    betas = [record["beta"] for record in records]
    assert betas == sorted(betas)
    assert betas[-1] == pytest.approx(200)
    assert records[-1]["precision"] == pytest.approx(3, rel=0.02)
    assert 0 <= records[-1]["validation"] <= 1


def test_inspect_counts_a_run_as_the_file_that_it_becomes(
    trained: Path, hardened: Path, tmp_path: Path
) -> None:
    found = []
    for path in (trained, hardened):
        assert run("inspect", path, "--json", tmp_path / "n.json", "--png", tmp_path / "n.png") == 0
        found.append(json.loads((tmp_path / "n.json").read_text()))
    sizes = [each.pop("file_bytes") for each in found]
    assert found[0] == found[1]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    # Layers take 4-bit inputs, the first 8-bit ones.
    layers, first = found[0]["layers"], found[0]["layers"][0]["bits"]
    assert found[0]["bit_operations"] < 32 * found[0]["macs"] * max(layer["bits"] for layer in layers)
    assert first >= 1


@pytest.mark.usefixtures("process_server")
def test_a_killed_run_resumes_to_the_same_last_bit(data: Path, tmp_path: Path) -> None:
    options = ["--model", "csq/resnet8", "--data", data, *SHORT, "--epochs", 5, "--image-size", 16]
    killed = tmp_path / "killed"
    arguments = [str(argument) for argument in ("train", "--out", killed, *options)]
    killed_at_a_checkpoint(killed, arguments)
    assert 0 < read_checkpoint(killed / CHECKPOINT).step < 15
    assert run("train", "--out", killed, "--resume", "--device", "cpu") == 0
    whole = tmp_path / "whole"
    assert run("train", "--out", whole, *options) == 0
    for name in ("log.jsonl", "report.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (read_checkpoint(folder / CHECKPOINT) for folder in (killed, whole))
    for part in ("model", "optimizer", "random"):
        kept, expected = getattr(ours, part), getattr(theirs, part)
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[key], expected[key]) for key in expected)


@pytest.mark.parametrize("method", ["csq-uniform", "lsq", "bsq", "hawq", "float"])
def test_rivals_train_harden_and_show_in_the_same_way(
    method: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "SAMPLES", 2)  # of hawq's traces
    out, file = tmp_path / "run", tmp_path / "m.safetensors"
    options = [*SHORT, "--method", method, "--epochs", 4]
    assert run("train", "--model", "csq/resnet8", "--data", data, "--out", out, *options) == 0
    assert run("harden", out, "--out", file) == 0
    if method == "float":
        assert run("inspect", out) == 2
        start = [*SHORT, "--weights", file, "--epochs", 1]
        tuned = tmp_path / "tuned"
        assert run("train", "--model", "csq/resnet8", "--data", data, "--out", tuned, *start) == 0
        return
    assert run("inspect", file, "--json", tmp_path / "n.json") == 0
    bits = json.loads((tmp_path / "n.json").read_text())["average_bits"]
    expected = {"bsq": (1, 8), "hawq": (1.5, 2)}.get(method, (2, 2))
    assert expected[0] <= bits <= expected[1]
    assert "Traceback" not in capsys.readouterr().err


def test_weights_are_where_training_starts_and_a_new_classifier_is_said(tmp_path: Path) -> None:
    whole = sources.build("csq/resnet8", 5, (1, 8, 8), seed=3)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    model = sources.build("csq/resnet8", 2, (1, 8, 8))
    with pytest.warns(UserWarning, match=r"fc\.weight, fc\.bias starts anew"):
        sources.load_weights(model, tmp_path / "w.safetensors", 2)
    assert torch.equal(model.conv1.weight, whole.conv1.weight)
    assert model.fc.out_features == 2


def test_grey_images_reach_torchvisions_models_as_three_channels() -> None:
    asked = Settings("torchvision/resnet18", "digits", limit=50)
    images = runs.read_images(asked)
    pixels = images.train.read(torch.tensor([0]))
    assert images.shape == (3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_published_weights_bring_their_normalization(data: Path) -> None:
    asked = Settings("torchvision/resnet18", str(data), image_size=32, weights="w.safetensors")
    assert runs.read_images(asked).mean == (0.485, 0.456, 0.406)
    own = Settings("torchvision/resnet18", str(data), image_size=32, mean=(0.1, 0.2, 0.3))
    assert runs.read_images(own).mean == (0.1, 0.2, 0.3)


def test_lambda_falls_with_the_steps_from_the_measured_to_the_official() -> None:
    assert stages.default_lambda(420) == pytest.approx(0.3)
    assert stages.default_lambda(117_000) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("code", [0, 1])
def test_prove_ends_with_the_verdict(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = ModuleType("csq.proof")
    calls = []
    proof.prove = lambda *arguments: calls.append(arguments) or code  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "csq.proof", proof)
    assert run("prove", "--out", tmp_path, "--seeds", 2, "--quick") == code
    assert calls == [(tmp_path, 2, True)]


TRAIN = ["train", "--model", "csq/resnet8", "--data", "{data}", "--out", "{out}", "--image-size", "32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{data}", "--out", "{out}"], "model: which one?"),
        ([*TRAIN[:5], "--out", "{out}"], "images are resized to"),
        ([*TRAIN, "--data", "{data}/nowhere"], "existing folder"),
        ([*TRAIN, "--data", "{data}/train"], "expected train/ and test/"),
        ([*TRAIN, "--n-bits", "9"], "invalid value for '--n-bits'"),
        ([*TRAIN, "--target-bits", "0"], "above 0"),
        ([*TRAIN, "--target-bits", "0.1"], "expected 0.125 to 8 bits"),
        ([*TRAIN, "--target-bits", "1.5", "--method", "lsq"], "the same whole number"),
        ([*TRAIN, "--skip", "head"], "matches no layer"),
        ([*TRAIN, "--lr", "-1"], "lr: expected a number above 0"),
        ([*TRAIN, "--mean", "0.5"], "mean: expected 3 numbers"),
        ([*TRAIN, "--mean", "a,b"], "expected numbers"),
        ([*TRAIN, "--device", "tpu9"], "no such device"),
        ([*TRAIN, "--weights", "nowhere.safetensors"], "there is no such file"),
        ([*TRAIN, "--weights", "{data}/test/rows/0.png"], "no whole safetensors file"),
        ([*TRAIN, "--model", "csq/resnet9"], "6 n + 2"),
        ([*TRAIN, "--model", "timm/resnet18x"], "close ones: resnet18"),
        ([*TRAIN, "--model", "torchvision/vgg11", "--image-size", "8"], "does not take images of 3x8x8"),
        ([*TRAIN, "--model", "no_such_module:make"], "no such module"),
        ([*TRAIN, "--model", "json:nothing"], "the module has no nothing"),
        ([*TRAIN, "--model", "json:loads"], "cannot be made by a call without arguments: TypeError"),
        ([*TRAIN, "--model", "sys:maxsize"], "cannot be made by a call without arguments: TypeError"),
        ([*TRAIN, "--model", "builtins:dict"], "expected a torch.nn.Module, got dict"),
        *(
            ([*TRAIN, f"--{name}", value], f"{name}: expected")
            for name in (
                "lr",
                "lam",
                "alpha",
                "weight-decay",
                "clip-norm",
                "search",
                "float-share",
                "target-bits",
            )
            for value in ("nan", "inf")
        ),
        ([*TRAIN, "--clip-norm", "0"], "clip-norm: expected a number above 0"),
        ([*TRAIN, "--lam", "-1"], "lam: expected a number above 0"),
        ([*TRAIN, "--search", "1.5"], "search: expected a share above 0, at most 1"),
        ([*TRAIN, "--validation", "1"], "validation: expected a share above 0 and below 1"),
        ([*TRAIN, "--shift", "32"], "shift: expected less than an image's side, 32"),
        ([*TRAIN, "--act-bits", "17"], "1 to 16 bits an activation"),
        ([*TRAIN, "--method", "hawq", "--target-bits", "0.9"], "hawq gives each layer 1 to 8 bits"),
        ([*TRAIN, "--n-bits", "2", "--target-bits", "3"], "expected 0.5 to 2 bits for 2 planes"),
        (["train", "--out", "{out}", "--resume"], "holds no run to go on with"),
        (["harden", "{data}", "--out", "x.safetensors"], "a folder that csq train wrote"),
        (["harden", "{trained}", "--out", "x.bin"], "ends in .safetensors"),
        (["harden", "{trained}", "--out", "{out}/no/x.safetensors"], "there is no folder"),
        (["inspect", "{data}/test/rows/0.png"], "no whole safetensors file"),
        (["inspect", "{hardened}", "--png", "x.txt"], "ends in .png"),
        (["export", "{hardened}", "--out", "x.onnx", "--opset", "7"], "18 to 23"),
        (["evaluate", "{hardened}"], "where images are"),
        (["evaluate", "{hardened}", "--data", "digits"], "its classes are not those"),
        (["evaluate", "{trained}", "--data", "digits"], "expected 2 classes"),
        (
            ["train", "--out", "{trained}", "--model", "csq/resnet8", "--data", "{data}"],
            "holds a run already",
        ),
        (["train", "--out", "{trained}", "--resume", "--target-bits", "2"], "expected 3.0, as it began with"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    data: Path,
    trained: Path,
    hardened: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"data": data, "trained": trained, "hardened": hardened, "out": tmp_path / "run"}
    before = {path: path.read_bytes() for path in trained.iterdir()}
    capsys.readouterr()
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1
    assert message.lower() in errors[0].lower()
    assert not (tmp_path / "run" / CHECKPOINT).exists()
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


def test_a_damaged_run_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (("{", "is damaged"), ('{"format": 9}', "expected format 1")):
        (tmp_path / "run.json").write_text(content)
        assert run("inspect", tmp_path) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "run.json").write_bytes((trained / "run.json").read_bytes())
    assert run("inspect", tmp_path) == 2
    assert "there is no such checkpoint" in capsys.readouterr().err


def test_a_file_without_notes_is_for_python(
    hardened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csq.save(runs.HardenedFile.open(hardened).model, tmp_path / "bare.safetensors")
    assert run("inspect", tmp_path / "bare.safetensors") == 2
    assert "use csq.load in Python" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", 3), ("shape", [3, 32]), ("shape", [True, 32, 32]), ("classes", []), ("classes", [1, 2]),
     ("mean", [0.5]), ("std", [0.2, 0.0, 0.2]), ("std", ["a", "b", "c"])],
)  # fmt: skip
def test_notes_that_are_none_are_named(
    key: str, value: object, hardened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs.HardenedFile.open(hardened)
    csq.save(file.model, tmp_path / "m.safetensors", notes={**file.notes, key: value})
    assert run("inspect", tmp_path / "m.safetensors") == 2
    assert re.search(rf"error: .*m\.safetensors: {key}: is damaged: expected", capsys.readouterr().err)


def test_a_damaged_checkpoint_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_bytes((trained / "run.json").read_bytes())
    tensors = load_file(trained / CHECKPOINT)
    with safe_open(trained / CHECKPOINT, "pt") as opened:
        metadata = opened.metadata()
    state = json.loads(metadata["state"])
    few = {name: value for name, value in tensors.items() if not name.startswith("model/conv1")}
    for changed, left, message in (
        ({"state": "{"}, tensors, "is damaged"),
        ({"state": "[]"}, tensors, "is damaged"),
        ({"state": json.dumps({**state, "step": "6"})}, tensors, "is damaged: expected step, fingerprint"),
        ({"checkpoint": "csq 1"}, tensors, "expected a checkpoint of the kind 'csq 4'"),
        ({}, few, "does not fit run.json"),
        ({}, {"model/x": torch.zeros(1)}, "expected the state of the generator"),
    ):
        save_file(left, tmp_path / CHECKPOINT, {**metadata, **changed})
        for arguments in (("inspect", tmp_path), ("harden", tmp_path, "--out", tmp_path / "m.safetensors")):
            assert run(*arguments) == 2
            (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
            assert message in error
