"""The proof: its scenes are what it says, its verdicts follow from its numbers, and a shortened run ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from kdcicam import proof
from kdcicam.data import load_images
from kdcicam.proof_scenes import (
    CLASSES,
    MASKS,
    SIZE,
    START_FROM,
    Sizes,
    Sources,
    apart_root,
    make_scenes,
    own_context,
    write_scenes,
)

pytest.importorskip("matplotlib")
SMALL = Sizes(train=3, val=2, test=3)


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources()


def test_digits_and_parts_of_photographs_are_of_one_part_only(sources: Sources, monkeypatch):
    """Confounder and split: which digit, which photograph and which half of it each scene takes."""
    from kdcicam import proof_scenes

    drawn: dict[str, set[tuple[int, int]]] = {}
    real = proof_scenes.make_scene

    def spy(sources, label, digit, part, generator):
        key = (label, digit)
        assert key not in drawn.setdefault(part, set())
        drawn[part].add(key)
        return real(sources, label, digit, part, generator)

    monkeypatch.setattr(proof_scenes, "make_scene", spy)
    make_scenes(sources, SMALL, 5)
    proof_scenes.make_objects(sources, 2, 5)
    parts = list(drawn.values())
    assert set(drawn) == {"train", "val", "together", "apart", "start"}
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert all(digit < START_FROM for part in ("train", "apart") for _, digit in drawn[part])
    for name, left in sources.left.items():
        whole = left.width + sources.right[name].width
        assert left.width == round(proof_scenes.TRAIN_PART * whole)


def test_a_context_is_the_classs_own_in_training_and_never_apart(sources: Sources):
    from kdcicam.proof_scenes import OWN, _context_of

    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        drawn = [_context_of(label, "train", generator) == own_context(label) for _ in range(400)]
        assert fmean(drawn) == pytest.approx(OWN, abs=0.05)
        assert own_context(label) not in {_context_of(label, "apart", generator) for _ in range(100)}
    assert [own_context(k) for k in range(CLASSES)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_scenes_are_a_users_image_folder_with_true_boxes(sources: Sources, tmp_path: Path):
    scenes = make_scenes(sources, SMALL, 0)
    root = tmp_path / "scenes"
    write_scenes(root, scenes)
    for part, folder, split in (("val", root, "val"), ("apart", apart_root(root), "test")):
        images = load_images(folder, split)
        assert images.labels == [scene.label for scene in scenes[part]]
        assert [tuple(map(int, boxes[0])) for boxes in images.boxes] == [scene.box for scene in scenes[part]]
    masks = np.load(apart_root(root) / MASKS)
    assert masks.shape == (CLASSES * SMALL.test, SIZE, SIZE)
    for scene in scenes["apart"]:
        x0, y0, x1, y1 = scene.box
        pixels = np.asarray(scene.image).astype(int)
        inside = pixels[y0:y1, x0:x1][~scene.context[y0:y1, x0:x1]]
        assert 0 <= x0 < x1 <= SIZE
        assert 0 <= y0 < y1 <= SIZE
        assert inside.min(1).max() > 150  # bright ink is inside the box
        assert scene.context.any()


def test_mass_on_the_context_by_hand():
    from kdcicam.proof_arms import mass_share

    maps = np.zeros((2, 4, 4))
    maps[0, :2], maps[1] = 3.0, 1.0
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[:, 1:] = True
    assert mass_share(maps, masks) == pytest.approx((0.5 + 0.75) / 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib and pyparsing among themselves
def test_a_shortened_proof_ends_and_its_verdicts_follow_from_its_numbers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        proof, "STUDENTS", {name: replace(arm) for name, arm in proof.STUDENTS.items() if name != "cam"}
    )
    monkeypatch.setattr(proof, "RIVALS", tuple(name for name in proof.RIVALS if name != "cam"))
    code = proof.run_proof(tmp_path, [3], quick=True, jobs=1)
    record = json.loads((tmp_path / "proof.json").read_text())
    assert code == (0 if record["holds"] else 1)
    methods = record["methods"]
    both = {
        name: {k: fmean(values[f"{k} {part}"][0] for part in ("together", "apart")) for k in proof.LABELS}
        for name, values in methods.items()
    }
    c, loc, ours = (both[name] for name in (proof.TEACHER_C, proof.TEACHER_L, "kdcicam"))
    assert [claim["holds"] for claim in record["claims"]] == [
        c["top1_cls"] > loc["top1_cls"] and loc["gt_known"] > c["gt_known"],
        both["ci-cam"]["max_box_acc_v2"] > both["nl-ccam"]["max_box_acc_v2"],
        ours["top1_loc"] > max(both[name]["top1_loc"] for name in proof.RIVALS),
        ours["top1_cls"] >= c["top1_cls"] - proof.TOLERANCE
        and ours["gt_known"] >= loc["gt_known"] - proof.TOLERANCE,
    ]
    for picture in record["pictures"]:
        assert (tmp_path / picture).stat().st_size > 5000
    for values in methods.values():
        assert all(0 <= value[0] <= 1 for value in values.values())
        for part in ("together", "apart"):
            assert values[f"top1_loc {part}"][0] <= values[f"gt_known {part}"][0]
