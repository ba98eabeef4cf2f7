"""The proof: its scenes are what it says, its verdicts follow from its numbers, and a shortened run ends."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from kdcicam import proof
from kdcicam.data import load_images
from kdcicam.proof_choices import ARMS, CHOSEN, DEVELOPMENT, GRIDS, arm, best_entry
from kdcicam.proof_scenes import (
    CLASSES,
    CONTEXTS,
    SIZE,
    START_FROM,
    Sizes,
    Sources,
    apart_root,
    make_scenes,
    make_start_scenes,
    masks_file,
    own_context,
    write_scenes,
)

pytest.importorskip("matplotlib")
SMALL = Sizes(train=3, val=4, test=3)


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
    make_start_scenes(sources, 2, 5)
    parts = list(drawn.values())
    assert set(drawn) == {"train", "val", "val-apart", "together", "apart", "start"}
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
        for part in ("apart", "val-apart"):
            assert own_context(label) not in {_context_of(label, part, generator) for _ in range(50)}
    assert [own_context(k) for k in range(CLASSES)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_scenes_are_a_users_image_folder_with_true_boxes(sources: Sources, tmp_path: Path):
    scenes = make_scenes(sources, SMALL, 0)
    root = tmp_path / "scenes"
    write_scenes(root, scenes)
    for part, folder, split in (("val", root, "val"), ("apart", apart_root(root), "test")):
        images = load_images(folder, split)
        assert images.labels == [scene.label for scene in scenes[part]]
        assert [tuple(map(int, boxes[0])) for boxes in images.boxes] == [scene.box for scene in scenes[part]]
    masks = np.load(masks_file(apart_root(root), "test"))
    assert masks.shape == (CLASSES * SMALL.test, SIZE, SIZE)
    for scene in scenes["apart"]:
        x0, y0, x1, y1 = scene.box
        pixels = np.asarray(scene.image).astype(int)
        inside = pixels[y0:y1, x0:x1][~scene.context[y0:y1, x0:x1]]
        assert 0 <= x0 < x1 <= SIZE
        assert 0 <= y0 < y1 <= SIZE
        assert inside.min(1).max() > 150  # bright ink is inside the box
        assert scene.context.any()


def test_the_start_learns_digits_and_contexts_each_alone(sources: Sources):
    scenes = make_start_scenes(sources, 2, 0)
    assert [scene.label for scene in scenes] == [k for k in range(CLASSES + len(CONTEXTS)) for _ in range(2)]
    assert not any(scene.context.any() for scene in scenes if scene.label < CLASSES)
    assert all(scene.context.sum() > 20 for scene in scenes if scene.label >= CLASSES)


def test_entanglement_by_hand():
    """Against the same distance on the object's other side: a map that only falls off around it is at 1."""
    from kdcicam.proof_arms import entanglement

    box = np.array([[4, 0, 6, 4]])
    mask = np.zeros((1, 4, 10), dtype=bool)
    mask[0, :, 5:8] = True  # column 5 is in the box, so 6 and 7 count, whose reflections are 3 and 2
    mask[0, 0, 9] = True  # its reflection is 0
    fall = 10.0 - np.abs(np.arange(10) - 4.5)
    assert entanglement(np.tile(fall, (1, 4, 1)), mask, box) == pytest.approx(1)
    right = np.where(np.arange(10) > 5, 4.0, 1.0)
    assert entanglement(np.tile(right, (1, 4, 1)), mask, box) == pytest.approx(4)


def test_every_arm_has_the_same_budget_and_a_choice_among_its_own_entries():
    assert GRIDS.keys() == ARMS.keys() == CHOSEN.keys()
    assert {len(entries) for entries in GRIDS.values()} == {4}
    spent = {"epochs", "batch_size"}  # the same images and steps for all, distilled or not
    assert not any(spent & arm(name, entry).settings.keys() for name in GRIDS for entry in range(4))
    for name, entry in CHOSEN.items():
        assert arm(name).settings.items() >= GRIDS[name][entry].items()
    assert best_entry({0: [0.1, 0.5], 1: [0.4, 0.4], 2: [0.4, 0.4]}) == 1


def test_the_judged_seeds_are_none_of_development():
    judged = {proof.FIRST_SEED + seed for seed in range(100)}
    assert judged.isdisjoint(DEVELOPMENT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib and pyparsing among themselves
def test_a_shortened_proof_ends_and_its_verdicts_follow_from_its_numbers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(proof, "AFTER", tuple(name for name in proof.AFTER if name != proof.ONLY_C))
    monkeypatch.setattr(proof, "RIVALS", tuple(name for name in proof.RIVALS if name != proof.ONLY_C))
    order: list[str] = []
    trained, claimed = proof.run_tasks, proof.ProofRun.claim
    monkeypatch.setattr(
        proof,
        "run_tasks",
        lambda tasks, *rest: order.extend(task.arm.role for task in tasks) or trained(tasks, *rest),
    )
    monkeypatch.setattr(
        proof.ProofRun, "claim", lambda *given, **more: order.append("claim") or claimed(*given, **more)
    )
    code = proof.run_proof(tmp_path, [3], quick=True, jobs=1)
    judged = order.index("claim")
    assert order[judged : judged + 2] == ["claim", "claim"]  # the context and the teachers
    assert set(order[:judged]) == {"cam", "cls", "loc"}
    assert "student" in order[judged:]
    record = json.loads((tmp_path / "proof.json").read_text())
    assert code == (0 if record["holds"] else 1)
    methods = record["methods"]
    both = {
        name: {k: fmean(values[f"{k} {part}"][0] for part in ("together", "apart")) for k in proof.LABELS}
        for name, values in methods.items()
    }
    c, loc, ours = (both[name] for name in (proof.TEACHER_C, proof.TEACHER_L, "kdcicam"))
    assert record["seeds"] == [proof.FIRST_SEED + 3]
    entangled = record["claims"][0]
    shown = [float(value) for value in entangled["reason"].removesuffix(" by seed").split(", ")]
    assert entangled["holds"] == (min(shown) >= proof.ENTANGLED) or min(shown) == proof.ENTANGLED
    assert [claim["holds"] for claim in record["claims"][1:]] == [
        c["top1_cls"] > loc["top1_cls"] and loc["gt_known"] > c["gt_known"],
        both["ci-cam"]["max_box_acc_v2"] > both["nl-ccam"]["max_box_acc_v2"],
        ours["top1_loc"] > max(both[name]["top1_loc"] for name in proof.RIVALS),
        ours["top1_cls"] >= c["top1_cls"] - proof.TOLERANCE
        and ours["gt_known"] >= loc["gt_known"] - proof.TOLERANCE,
    ]
    for picture in record["pictures"]:
        assert (tmp_path / picture).stat().st_size > 5000
    for values in methods.values():
        assert all(0 <= value[0] <= 1 for key, value in values.items() if "entanglement" not in key)
        for part in ("together", "apart"):
            assert values[f"top1_loc {part}"][0] <= values[f"gt_known {part}"][0]
