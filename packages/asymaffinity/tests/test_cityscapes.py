"""Cityscapes' AP by hand, and its format of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from asymaffinity.cityscapes import cityscapes_ap, score_rows, write_results
from asymaffinity.datasets import cityscapes_boxes
from asymaffinity.predictions import cityscapes_truth

CAR, PERSON = 26, 24


def street() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A car, a small car, a group of cars, an ignored region, a person; the rest is road."""
    ids = np.full((60, 100), 7)
    parts = {"car": (26_000, 0, 20, 0, 20), "small": (26_001, 0, 9, 30, 39), "group": (26, 0, 20, 50, 70)}
    parts |= {"ignored": (4, 40, 60, 0, 20), "person": (24_000, 40, 60, 40, 50)}
    masks = {}
    for name, (value, y0, y1, x0, x1) in parts.items():
        ids[y0:y1, x0:x1] = value
        masks[name] = ids == value
    return ids, masks


def test_what_costs_and_what_does_not():
    ids, masks = street()
    whole = [(masks["car"], CAR, 0.9), (masks["person"], PERSON, 0.9)]
    assert cityscapes_ap([(ids, whole)]) == {"ap": 1, "ap50": 1, "ap_person": 1, "ap_car": 1}
    # On groups, ignored regions and instances below 100 pixels nothing is wrong.
    free = [(masks[name], CAR, 0.95) for name in ("small", "group", "ignored")]
    assert cityscapes_ap([(ids, whole + free)])["ap"] == 1
    road = np.zeros_like(masks["car"])
    road[25:35, 70:90] = True
    # One wrong and surer: precision 1/2 at recall 1; its step has half of the artificial point's width.
    assert cityscapes_ap([(ids, [*whole, (road, CAR, 0.95)])])["ap_car"] < 0.6
    assert cityscapes_ap([(ids, [*whole, (road, CAR, 0.1)])])["ap_car"] == pytest.approx(1)
    twice = [*whole, (masks["car"], CAR, 0.95)]
    assert cityscapes_ap([(ids, twice)])["ap_car"] == pytest.approx(1)  # the less sure one is the wrong one
    assert cityscapes_ap([(ids, whole[:1])]) == {"ap": 0.5, "ap50": 0.5, "ap_person": 0, "ap_car": 1}
    assert cityscapes_ap([(ids, [])])["ap"] == 0
    assert cityscapes_ap([(np.full((9, 9), 7), [])]) == {"ap": 0, "ap50": 0}


def test_a_mask_counts_at_the_overlaps_below_its_own():
    ids, masks = street()
    part = masks["car"].copy()
    part[14:20, :20] = False  # 14 of 20 rows: IoU .7
    found = cityscapes_ap([(ids, [(part, CAR, 0.9)])])
    assert found["ap_car"] == pytest.approx(0.4)  # .50, .55, .60, .65, not .70
    assert found["ap50"] == 0.5  # of car and person


def test_missed_ones_and_several_images_lower_the_recall():
    ids, masks = street()
    seen, unseen = (ids, [(masks["car"], CAR, 0.9), (masks["person"], PERSON, 0.9)]), (ids, [])
    assert cityscapes_ap([seen, unseen])["ap"] == pytest.approx(0.5)


def test_results_of_a_folder_are_scored_and_written(tmp_path: Path):
    root = trees.cityscapes(tmp_path / "data", "val")
    data = cityscapes_boxes(root, "val", depth=False, keep_empty=True)
    rows = [{**row, "score": 0.9} for row in cityscapes_truth(data, root)["annotations"]]
    assert score_rows(rows, data, root, "val")["cityscapes_ap"] == 1
    write_results(rows, data, tmp_path / "results")
    texts = sorted((tmp_path / "results").glob("*.txt"))
    assert [text.name for text in texts] == [f"aachen_{n:06d}_000019.txt" for n in range(3)]
    name, thing, score = texts[0].read_text().splitlines()[0].split(" ")
    assert (thing, score) == (str(rows[0]["category_id"]), "0.9")
    with Image.open(tmp_path / "results" / name) as mask:
        assert np.count_nonzero(np.asarray(mask)) == rows[0]["area"]
    assert texts[2].read_text() == ""
