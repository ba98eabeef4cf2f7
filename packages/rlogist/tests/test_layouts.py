from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlogist.layouts import (
    SlideRecord,
    camelyon16,
    find_slides,
    patient_of,
    public_layout,
    read_labels,
    split_patients,
    tcga,
    write_labels,
)
from shared_core import InputError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_slides_are_found_at_any_depth_and_only_slides(tmp_path: Path):
    touch(tmp_path, "b.tif", "deep/er/a.SVS", "notes.txt", ".hidden.tif", "x.png")
    assert [path.name for path in find_slides(tmp_path)] == ["b.tif", "a.SVS"]
    with pytest.raises(InputError, match="there is no such file or folder"):
        find_slides(tmp_path / "none")
    with pytest.raises(InputError, match="has no slide"):
        find_slides(touch(tmp_path / "empty", "readme.txt"))


def test_labels_find_slides_by_path_or_name(tmp_path: Path):
    slides = touch(tmp_path / "s", "a.tif", "sub/b.tif", "sub/ü c.tif")
    rows = "WSI_path,label\na.tif,1\nsub/b.tif,0\nü c,1\n"
    records = read_labels(table(tmp_path / "l.csv", "\ufeff" + rows), slides)
    assert [(record.name, record.label) for record in records] == [("a", "1"), ("b", "0"), ("ü c", "1")]


def test_all_problems_of_a_label_table_are_told_at_once(tmp_path: Path):
    slides = touch(tmp_path / "s", "a.tif", "b.tif", "c.tif", "x/d.tif", "y/d.tif")
    rows = "WSI_path,label\na.tif,1\na.tif,1\nnone.tif,0\nb.tif,\nd.tif,1\nc.tif,7\n"
    with pytest.raises(InputError, match="7 problems") as caught:
        read_labels(table(tmp_path / "l.csv", rows), slides, known=["0", "1"])
    message = str(caught.value)
    for words in (
        "line 3: 'a.tif' stands in line 2 too",
        "line 4: there is no slide 'none.tif'",
        "line 5: 'b.tif' has no label",
        "line 6: several slides are 'd.tif'",
        "line 7: label '7' is none of 0, 1",
        "d.tif has no row",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide,label\na,1\n", "missing: WSI_path"),
        ("WSI_path,label\n", "has no rows"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, text: str, words: str):
    with pytest.raises(InputError, match=words):
        read_labels(table(tmp_path / "l.csv", text), touch(tmp_path / "s", "a.tif"))


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("TCGA-05-4244-01Z-00-DX1.d4ff32cd.svs", "TCGA-05-4244"),
        ("TCGA-05-4244.svs", "TCGA-05-4244"),
        ("TCGA-05-42449.svs", "TCGA-05-42449"),
        ("tumor_001.tif", "tumor_001"),
    ],
)
def test_the_patient_of_a_barcode_is_its_first_12_characters(name: str, patient: str):
    assert patient_of(name) == patient


def camelyon(root: Path) -> Path:
    touch(
        root,
        "training/normal/normal_001.tif",
        "training/tumor/tumor_001.tif",
        "training/lesion_annotations/tumor_001.xml",
        "testing/images/test_001.tif",
        "testing/images/test_002.tif",
        "testing/lesion_annotations/test_001.xml",
    )
    table(root / "testing/reference.csv", "test_001,Tumor,IDC,Macro\ntest_002,Normal,None,None\n")
    return root


def test_camelyon16_as_it_is_distributed(tmp_path: Path):
    found = {record.name: record for record in camelyon16(camelyon(tmp_path))}
    assert {name: (r.label, r.split) for name, r in found.items()} == {
        "normal_001": ("normal", "train"),
        "tumor_001": ("tumor", "train"),
        "test_001": ("tumor", "test"),
        "test_002": ("normal", "test"),
    }
    assert {name for name, record in found.items() if record.annotation} == {"tumor_001", "test_001"}


def test_the_label_table_of_a_data_set_finds_the_features_of_its_slides(tmp_path: Path):
    slides = touch(
        tmp_path / "tcga", "LUAD/u1/TCGA-05-4244-01Z-00-DX1.abc.svs", "LUSC/u2/TCGA-18-3406-01A.d.svs"
    )
    for root in (camelyon(tmp_path / "c16"), slides):
        records = public_layout(root)
        write_labels(tmp_path / "labels.csv", records, root)
        expected = [replace(record, annotation=None) for record in records]
        assert read_labels(tmp_path / "labels.csv", root) == expected
        features = tmp_path / f"{root.name}-features"  # `rlogist extract` mirrors the folders of slides
        touch(features, *(str(r.path.relative_to(root).with_suffix(".h5")) for r in records))
        found = read_labels(tmp_path / "labels.csv", features, suffixes=frozenset({".h5"}))
        kept = [(record.name, record.patient, record.label, record.split) for record in found]
        assert kept == [(r.name, r.patient, r.label, r.split) for r in records]


def test_what_is_missing_of_camelyon16_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"missing: training/normal, training/tumor, testing/images"):
        camelyon16(tmp_path)
    root = camelyon(tmp_path)
    table(root / "testing/reference.csv", "test_001,Tumor\n")
    with pytest.raises(InputError, match="missing: test_002"):
        camelyon16(root)
    (root / "testing/reference.csv").unlink()
    with pytest.raises(InputError, match=r"reference\.csv: is missing"):
        camelyon16(root)


def test_tcga_with_labels_by_patient_or_by_project_folder(tmp_path: Path):
    slides = touch(
        tmp_path,
        "LUAD/uuid-1/TCGA-05-4244-01Z-00-DX1.abc.svs",
        "TCGA-LUSC/uuid-2/TCGA-18-3406-01Z-00-DX1.d.svs",
    )
    assert [record.label for record in tcga(slides)] == ["LUAD", "LUSC"]
    assert [record.label for record in tcga(slides, {"TCGA-05-4244": "a", "TCGA-18-3406": "b"})] == ["a", "b"]
    touch(tmp_path, "loose/slide7.svs")
    with pytest.raises(InputError, match=r"2 problems: TCGA-18-3406\S+ has no label; slide7\.svs is no TCGA"):
        tcga(slides, {"TCGA-05-4244": "a"})


@given(
    patients=st.lists(st.integers(1, 4), min_size=12, max_size=40),
    seed=st.integers(0, 99),
)
def test_no_patient_stands_on_two_sides_and_classes_are_shared_out(patients: list[int], seed: int):
    records = [
        SlideRecord(Path(f"p{p}_{i}.svs"), f"p{p}", str(p % 2))
        for p, n in enumerate(patients)
        for i in range(n)
    ]
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    split = split_patients(records, shares, seed)
    assert [record.path for record in split] == [record.path for record in records]
    sides: dict[str, set] = {}
    for record in split:
        sides.setdefault(record.patient, set()).add(record.split)
    assert all(len(own) == 1 for own in sides.values())
    for label in ("0", "1"):
        counts = Counter(next(iter(sides[p])) for p in sides if int(p[1:]) % 2 == int(label))
        total = sum(counts.values())
        for name, share in shares.items():
            assert counts[name] >= 1
            assert abs(counts[name] - share * total) <= 1
    assert split_patients(records, shares, seed) == split


def test_splits_that_cannot_be_made_are_refused():
    records = [SlideRecord(Path("a.svs"), "a", "0"), SlideRecord(Path("b.svs"), "b", "0")]
    with pytest.raises(InputError, match="label '0' has 2 patients, expected at least one for each of 3"):
        split_patients(records, {"a": 0.5, "b": 0.3, "c": 0.2})
    with pytest.raises(InputError, match="expected shares above 0 that add up to 1"):
        split_patients(records, {"a": 0.5, "b": 0.6})
