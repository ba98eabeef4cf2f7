from __future__ import annotations

import csv
import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from generated_slides import tissue_picture, tissue_slide

from rlogist import cli
from rlogist.demo_slides import write_pyramid
from rlogist.features import read_features
from shared_core import command


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        command.run(cli.app, [str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return int(stopped.value.code), shown.out, shown.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    slides = tmp_path / "slides"
    (slides / "sub é").mkdir(parents=True)
    tissue_slide(slides / "a.tif")
    tissue_slide(slides / "sub é" / "b.tif", seed=1)
    return slides


def table(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "slides.csv", encoding="utf-8") as file:
        return {Path(row["slide"]).name: row for row in csv.DictReader(file)}


def test_segment_writes_picture_grid_and_geojson(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "segment", folder, "--out", tmp_path / "o", "--patch", 32)
    assert code == 0
    assert "a.tif: done" in out
    report = json.loads((tmp_path / "o" / "sub é" / "b.json").read_text(encoding="utf-8"))
    assert report["regions"] == len(report["coords"]) > 0
    assert report["ledger"]["reads"][0]["purpose"] in ("picture", "segment")
    assert (tmp_path / "o" / "a.png").stat().st_size > 1000
    shapes = json.loads((tmp_path / "o" / "a.geojson").read_text())["features"]
    assert len(shapes) == report["contours"] + report["regions"]


def test_a_broken_slide_does_not_stop_the_others_and_the_exit_code_tells(folder, tmp_path, capsys):
    (folder / "broken.tif").write_bytes(b"II*\0" + b"\0" * 40)
    write_pyramid(folder / "nompp.tif", tissue_picture(), mpp=None)
    out = tmp_path / "o"
    code, shown, errors = run(
        capsys, "extract", folder, "--out", out, "--patch", 32, "--extractor", "stain", "--deep"
    )
    assert code == 2
    assert "2 of 4 slides failed:" in errors
    assert "broken.tif: not a slide" in errors
    assert "nompp.tif: the file does not state its microns per pixel" in errors
    assert shown.count("done") == 2
    assert len(read_features(out / "a.h5")) > 0
    rows = table(out)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.tif": "done",
        "b.tif": "done",
        "broken.tif": "failed",
        "nompp.tif": "failed",
    }
    assert "Traceback" not in errors


def test_extract_again_keeps_what_is_there_and_refuses_to_mix(folder, tmp_path, capsys):
    out = tmp_path / "o"
    base = ("extract", folder, "--out", out, "--patch", 32, "--extractor", "stain")
    assert run(capsys, *base)[0] == 0
    before = (out / "a.h5").stat().st_mtime_ns
    code, shown, _ = run(capsys, *base)
    assert code == 0
    assert shown.count("kept") == 2
    assert (out / "a.h5").stat().st_mtime_ns == before
    code, _, errors = run(capsys, *base, "--deep")
    assert code == 2
    assert "was made with other settings" in errors


def test_two_processes_write_the_same_files_as_one(folder, tmp_path, capsys):
    base = ("extract", folder, "--patch", 32, "--extractor", "stain")
    assert run(capsys, *base, "--out", tmp_path / "one")[0] == 0
    assert run(capsys, *base, "--out", tmp_path / "two", "--jobs", 2)[0] == 0
    for name in ("a.h5", "sub é/b.h5"):
        one, two = read_features(tmp_path / "one" / name), read_features(tmp_path / "two" / name)
        assert (one.features == two.features).all()


def test_no_tissue_is_a_result_and_no_failure(tmp_path, capsys):
    path = tissue_slide(tmp_path / "glass.tif", height=512, width=512, margin=255)
    code, shown, _ = run(capsys, "segment", path, "--out", tmp_path / "o", "--patch", 32)
    assert code == 0
    assert "glass.tif: no tissue, 0 regions" in shown


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_told(folder, tmp_path, capsys):
    out = tmp_path / "o"
    out.mkdir()
    out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    code, _, errors = run(capsys, "segment", folder, "--out", out, "--patch", 32)
    assert code == 2
    assert "Traceback" not in errors


def test_an_output_on_a_read_only_disk_is_told(folder, tmp_path, capsys, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for arguments in (("segment", folder), ("demo-slides",)):
        code, _, errors = run(capsys, *arguments, "--out", tmp_path / "o")
        assert (code, errors.count("\n")) == (2, 1)
        assert "the folder cannot be made: Read-only file system" in errors


def test_an_output_that_is_a_file_is_told(folder, tmp_path, capsys):
    (tmp_path / "o").write_text("in the way")
    code, _, errors = run(capsys, "segment", folder, "--out", tmp_path / "o", "--patch", 32)
    assert code == 2
    assert str(tmp_path / "o") in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("segment", "/no/such", "--out", "o"), "/no/such: there is no such file or folder"),
        (("extract", ".", "--out", "o", "--extractor", "resnet5"), "extractor: expected resnet50, stain"),
        (("segment", ".", "--out", "o", "--patch", "3"), "--patch"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, words, capsys):
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert words in errors
    assert errors.count("\n") == 1


def test_the_label_table_of_a_data_set_is_written(tmp_path, capsys):
    (tmp_path / "TCGA-LUAD" / "u").mkdir(parents=True)
    (tmp_path / "TCGA-LUAD" / "u" / "TCGA-05-4244-01Z-00-DX1.abc.svs").touch()
    code, shown, _ = run(capsys, "labels", tmp_path, "--out", tmp_path / "l.csv")
    assert (code, "1 slides (1 LUAD)" in shown) == (0, True)
    assert (tmp_path / "l.csv").read_text().splitlines()[1] == (
        "TCGA-LUAD/u/TCGA-05-4244-01Z-00-DX1.abc.svs,LUAD,TCGA-05-4244,"
    )
    (tmp_path / "training" / "normal").mkdir(parents=True)  # now it looks like CAMELYON16, and is not whole
    code, _, errors = run(capsys, "labels", tmp_path, "--out", tmp_path / "m.csv")
    assert (code, "missing: training/tumor, testing/images" in errors) == (2, True)


def test_demo_slides_can_be_extracted(tmp_path, capsys):
    out = tmp_path / "demo"
    assert run(capsys, "demo-slides", "--out", out, "--slides", 1, "--size", 1024)[0] == 0
    code, shown, _ = run(
        capsys, "extract", out / "slides", "--out", tmp_path / "f", "--patch", 64, "--extractor", "stain"
    )
    assert code == 0
    assert "done" in shown


def test_help_needs_neither_torch_nor_openslide():
    code = (
        "import sys; from rlogist.cli import app; from typer.main import get_command; get_command(app);"
        "sys.exit(' '.join({'torch', 'openslide', 'cv2', 'h5py'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
