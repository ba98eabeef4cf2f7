"""The command on a user's own class folders, from training to boxes; and what wrong input says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import trees
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score

from kdcicam import cli
from kdcicam.baselines import BASELINES
from kdcicam.boxes import boxes_from_map
from kdcicam.checkpoints import load_model, save_model
from kdcicam.data import load_images
from kdcicam.images import for_evaluation, read_image
from kdcicam.masks import read_mask
from kdcicam.model import CICAM
from shared_core.testing import exit_code

# accelerate's own use of deprecated torch calls; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SHORT = [
    "--backbone", "tiny:backbone", "--image-size", 24, "--epochs", 6, "--batch-size", 6, "--lr", 0.02,
    "--device", "cpu", "--set", "lr_ratio=1", "--set", "augmentation=whole", "--set", "validation=0.25",
    "--set", "augmentation_cls=crop:0.5,1", "--set", "augmentation_loc=crop:0.5,1",
]  # fmt: skip


PLACES = ["--out", "x", "--data", "DATA"]


def run(*arguments: object) -> int:
    return exit_code(cli.app, *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trees.class_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for role, more in (("cls", ["auxiliary=fore"]), ("loc", ["auxiliary=diff_aux"])):
        made[role] = tmp_path_factory.mktemp("runs") / role
        extra = [part for text in more for part in ("--set", text)]
        assert run("train-teacher", "--role", role, "--data", data, "--out", made[role], *SHORT, *extra) == 0
    return made


def test_from_class_folders_to_boxes(data: Path, teachers: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "student"
    both = ["--cls", teachers["cls"], "--loc", teachers["loc"]]
    assert (
        run("train-student", *both, "--data", data, "--out", out, *SHORT, "--set", "temperature_cls=4") == 0
    )
    assert "standard" in capsys.readouterr().out  # which KL was used
    history = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"ce", "cls", "loc"} <= history[0].keys()
    assert load_model(out).classes_in_pool > 0

    assert run("eval", out, "--data", data, "--json", tmp_path / "n.json", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "whole crop" in shown
    assert "centre box" in shown
    (row,) = json.loads((tmp_path / "n.json").read_text())
    assert row["images"] == 9
    assert row["top1_cls"] > 0.8
    assert row["threshold_from"] == "validation images"

    folder = tmp_path / "found"
    images = [data / "test" / "disc", data / "test" / "square" / "test0.png"]
    assert run("localize", out, *images, "--out", folder, "--device", "cpu") == 0
    rows = json.loads((folder / "boxes.json").read_text())["images"]
    assert len(rows) == 4
    for entry in rows:
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 < x1 <= entry["width"] == 48
        assert 0 <= y0 < y1 <= entry["height"] == 40
        assert entry["classes"][0]["class"] in trees.CLASSES
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 4
    with Image.open(pictures[0]) as drawn:
        assert drawn.size == (48, 40)


def test_compare_prints_every_map_of_every_model(
    data: Path, teachers: dict[str, Path], tmp_path: Path, capsys
):
    numbers = tmp_path / "n.json"
    options = [
        "--data",
        data,
        "--json",
        numbers,
        "--device",
        "cpu",
        "--no-contours",
        "--protocol",
        "center_crop",
    ]
    assert run("compare", *teachers.values(), *options) == 0
    rows = json.loads(numbers.read_text())
    assert [(row["role"], row["map"]) for row in rows] == [
        (role, kind) for role in ("cls", "loc") for kind in ("ci-cam", "nl-ccam", "cam", "grad-cam")
    ]
    assert all(row["protocol"] == "center_crop" for row in rows)
    assert "center_crop protocol, 9 images" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "flags"), [((), (0, 1, 2)), (("cls",), (0, 1)), (("loc",), (0, 2))])
def test_students_of_one_teacher_and_of_none(data: Path, teachers, tmp_path: Path, given, flags) -> None:
    options = [part for role in given for part in (f"--{role}", teachers[role])]
    assert run("train-student", *options, "--data", data, "--out", tmp_path, *SHORT, "--epochs", 1) == 0
    kept = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert tuple(kept["flags"]) == flags
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert {"cls", "loc"} & first.keys() == set(given)


def test_a_run_goes_on_by_resume_and_refuses_another_setting(data: Path, tmp_path: Path, capsys) -> None:
    asked = ["train-teacher", "--role", "ci-cam", "--data", data, "--out", tmp_path, *SHORT, "--epochs", 1]
    assert run(*asked) == 0
    before = load_file(tmp_path / "model.safetensors")
    assert run(*asked) == 2
    assert "holds a run already; --resume" in capsys.readouterr().err
    assert run(*asked, "--resume") == 0
    assert all(
        torch.equal(value, before[key]) for key, value in load_file(tmp_path / "model.safetensors").items()
    )
    assert run(*asked, "--resume", "--lr", 0.5) == 2
    assert "lr: is another run: expected 0.02" in capsys.readouterr().err


def test_unreadable_training_images_are_named_or_counted(tmp_path: Path, capsys) -> None:
    data = trees.class_folders(tmp_path / "data")
    (data / "train" / "disc" / "train0.png").write_bytes(b"")
    asked = ["train-teacher", "--role", "ci-cam", "--data", data, *SHORT, "--epochs", 1]
    assert run(*asked, "--out", tmp_path / "a") == 2
    assert "train0.png: is empty" in capsys.readouterr().err
    assert run(*asked, "--out", tmp_path / "b", "--on-error", "skip") == 0
    said = capsys.readouterr()
    assert "17, 1 unreadable" in said.out
    assert "train0.png: is empty" in said.err
    pictures = [data / "train" / "disc" / "train0.png", data / "train" / "disc" / "train1.png"]
    assert run("localize", tmp_path / "b", *pictures, "--out", tmp_path / "c", "--on-error", "skip") == 0
    rows = json.loads((tmp_path / "c" / "boxes.json").read_text())["images"]
    assert "is empty" in rows[0]["error"]
    assert "box" in rows[1]


def test_a_teacher_without_pool_is_refused_and_gets_it_by_an_option(
    teachers, data, tmp_path: Path, capsys
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((teachers["cls"] / name).read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    pool = state.pop("pool")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "mask_train_up.pkl").write_bytes(b"\x80\x04cos\nsystem\n.")
    asked = ["eval", tmp_path, "--data", data, "--thr", 0.2, "--no-contours", "--device", "cpu"]
    assert run(*asked) == 2
    assert "has no context pool (mask_train_up.pkl beside it" in capsys.readouterr().err
    assert run(*asked, "--pool", tmp_path / "mask_train_up.pkl") == 2
    assert "without running code from it, which is refused" in capsys.readouterr().err
    torch.save(pool[None], tmp_path / "pool.pt")
    assert run(*asked, "--pool", tmp_path / "pool.pt") == 0
    torch.save(pool[:2], tmp_path / "pool.pt")
    assert run(*asked, "--pool", tmp_path / "pool.pt") == 2
    assert "pool: expected the pool (3, 6, 6) (got (2, 6, 6))" in capsys.readouterr().err


def test_a_pool_beside_the_weights_serves_every_command(teachers, data, tmp_path: Path, capsys) -> None:
    poolless = tmp_path / "teacher"
    shutil.copytree(teachers["cls"], poolless)
    state = load_file(poolless / "model.safetensors")
    pool = state.pop("pool")
    save_file(state, poolless / "model.safetensors")
    student = [
        "train-student",
        "--cls",
        poolless,
        "--data",
        data,
        "--out",
        tmp_path / "s",
        *SHORT,
        "--epochs",
        1,
    ]
    compare = ["compare", poolless, "--data", data, "--thr", 0.2, "--no-contours", "--device", "cpu"]
    for asked in (student, compare):
        assert run(*asked) == 2
        assert "put it beside the weights as pool.safetensors or pool.pt" in capsys.readouterr().err
    torch.save(pool[None], poolless / "pool.pt")
    for asked in (student, compare):
        assert run(*asked) == 0
    assert torch.equal(load_model(poolless).pool, pool)


@pytest.mark.parametrize(
    ("role", "kind"), [("cam", "cam"), ("nl-ccam", "nl-ccam"), ("ci-cam", "ci-cam"), ("student", "ci-cam")]
)
def test_eval_and_localize_read_the_map_of_the_role(data, tmp_path: Path, role, kind) -> None:
    torch.manual_seed(1)
    model = CICAM("tiny:backbone", 3, image_size=24, context=role not in ("cam", "nl-ccam")).eval()
    tiny.with_pool(model)
    save_model(model, tmp_path, {"role": role, "classes": trees.CLASSES})
    options = ["--data", data, "--thr", 0.2, "--no-contours", "--device", "cpu"]
    assert run("eval", tmp_path, *options, "--json", tmp_path / "n.json") == 0
    (row,) = json.loads((tmp_path / "n.json").read_text())
    assert row["map"] == kind
    image = data / "test" / "disc" / "test0.png"
    assert run("localize", tmp_path, image, "--out", tmp_path, "--thr", 0.2, "--device", "cpu") == 0
    (found,) = json.loads((tmp_path / "boxes.json").read_text())["images"]
    batch = for_evaluation(read_image(image), np.empty((0, 4)), "full", 24)[0][None]
    maps, _ = BASELINES[kind](model, model(batch), batch, None)
    box = boxes_from_map(maps[0].detach().numpy(), 0.2).box
    assert found["box"] == pytest.approx(np.array(box) * [2, 40 / 24, 2, 40 / 24], abs=0.01)


def test_eval_reports_pxap_where_images_have_masks(tmp_path: Path, capsys) -> None:
    metadata, images = trees.openimages(tmp_path / "data")
    model = tiny.with_pool(CICAM("tiny:backbone", 3, image_size=24)).eval()
    save_model(model, tmp_path / "m", {"role": "ci-cam", "classes": trees.CLASSES})
    asked = [
        "eval",
        tmp_path / "m",
        "--data",
        metadata,
        "--images",
        images,
        "--masks",
        images,
        "--device",
        "cpu",
    ]
    assert run(*asked, "--json", tmp_path / "n.json") == 0
    shown = capsys.readouterr().out
    assert "PxAP" in shown
    assert "full protocol, 6 images" in shown
    assert "GT-known" not in shown
    (row,) = json.loads((tmp_path / "n.json").read_text())
    test, scores, truth = load_images(metadata, "test", images=images), [], []
    for file, masks in zip(test.files, test.masks, strict=True):
        batch = for_evaluation(read_image(file), np.empty((0, 4)), "full", 24)[0][None]
        values = BASELINES["ci-cam"](model, model(batch), batch, None)[0][0].detach()
        mask = read_mask(masks, "full", 24)
        scores += ((values - values.min()) / (values.max() - values.min()))[mask != 255].tolist()
        truth += mask[mask != 255].tolist()
    assert row["pxap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train-teacher", *PLACES], "role: which one? --role or --recipe"),
        (["train-teacher", *PLACES, "--role", "student"], "expected one of cls, loc"),
        (["train-teacher", *PLACES, "--recipe", "cub-vgg16-student"], "is for train-student"),
        (["train-student", *PLACES, "--recipe", "cub-vgg16-cls"], "is for train-teacher"),
        (["train-teacher", *PLACES, "--role", "cam", *SHORT, "--set", "auxiliary=fore"], "is for the roles"),
        (["train-teacher", *PLACES, "--role", "cls", *SHORT, "--set", "last=4"], "last: expected 1 to the 3"),
        (["train-teacher", "--out", "x", "--data", "nowhere", "--role", "cls"], "there is no such folder"),
        (["eval", "CLS", "--data", "DATA", "--thr", "best"], "expected validation, oracle or a share"),
        (["eval", "DATA", "--data", "DATA"], "there is no config.json"),
        (["compare", "CLS", "--data", "DATA", "--methods", "scorecam"], "method: expected one of ci-cam"),
        (["localize", "CLS", "nothing.png", "--out", "x"], "nothing.png: there is no such image"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(data, teachers, tmp_path, monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data, "CLS": teachers["cls"]}
    assert run(*(places.get(part, part) for part in arguments)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom kdcicam import cli\nfrom shared_core import command\n"
        "try:\n    command.run(cli.app, ['train-student', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
