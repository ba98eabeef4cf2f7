"""Metrics on cases counted by hand, and against scikit-learn and a literal loop over OpenCV's contours."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from kdcicam.metrics import PixelAveragePrecision, WSOLEvaluator
from shared_core import InputError

SIDE = 40


def blob(x0: int, y0: int, x1: int, y1: int) -> torch.Tensor:
    """A map whose official and contour box is this one at thresholds below 1."""
    values = torch.zeros(SIDE, SIDE)
    values[y0:y1, x0:x1] = 1.0
    return values


def logits(*top: int, classes: int = 8) -> torch.Tensor:
    scores = torch.zeros(len(top), classes)
    scores[range(len(top)), list(top)] = 1
    for rank, row in enumerate(scores):  # the rest: 7 is always last but one, 6 last
        row += torch.tensor([0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.0, 0.05])[:classes] * 0.9 + 0 * rank
    return scores


def evaluator(**options) -> WSOLEvaluator:
    return WSOLEvaluator("full", contour_thresholds=np.arange(0, 1, 0.1), **options)


def test_top_1_top_5_and_gt_known_by_hand():
    """Six images: right and hit; right and missed; wrong and hit in the top 5; wrong and hit outside it;
    right without a box; right, and hit by the second of two boxes."""
    made = evaluator()
    maps = torch.stack([blob(4, 4, 14, 14)] * 6)
    hit, miss = np.array([[4, 4, 14, 14]]), np.array([[20, 20, 38, 38]])
    truths = [hit, miss, hit, hit, np.empty((0, 4)), np.array([*miss, *hit])]
    labels = torch.tensor([0, 1, 1, 6, 2, 3])
    made.update(maps, logits(0, 1, 0, 0, 2, 3), labels, truths)
    found = made.compute(0.2)
    assert found["top1_cls"] == 4 / 6
    assert found["top5_cls"] == 5 / 6
    assert (found["top1_loc"], found["top5_loc"], found["gt_known"]) == (2 / 5, 3 / 5, 4 / 5)
    assert (found["images"], found["unboxed"], found["no_map"]) == (6, 1, 0)
    assert found["protocol"] == "full"


@pytest.mark.parametrize(("width", "known"), [(21, 1), (22, 0)])
def test_the_overlap_counts_pixels_inclusively(width, known):
    """The box takes 11 columns of the truth's 22 or 23: one half and less; plain areas would miss both."""
    made = evaluator()
    made.update(blob(0, 0, 10, 10)[None], logits(0), torch.tensor([0]), [np.array([[0, 0, width, 10]])])
    expected = 11 / (width + 1) >= 0.5
    assert made.compute(0.2)["gt_known"] == known == expected


def test_max_box_acc_takes_one_threshold_for_all_images():
    """Trap 9: two maps, each boxed right at another threshold only: half, where a best threshold for each
    image would say all."""
    low, high = blob(4, 4, 36, 36) * 0.3, blob(4, 4, 36, 36) * 0.3
    low[10:16, 10:16] = 1.0  # right below 0.3: the large square
    high[10:16, 10:16] = 1.0  # right above 0.3: the small one
    made = evaluator(iou_thresholds=(0.5,))
    made.update(
        torch.stack([low, high]),
        logits(0, 0),
        torch.tensor([0, 0]),
        [np.array([[4, 4, 36, 36]]), np.array([[10, 10, 16, 16]])],
    )
    found = made.compute(0.2)
    assert found["max_box_acc"] == 0.5
    assert found["max_box_acc_v2"] == 0.5
    assert made.compute("oracle")["gt_known"] == 0.5


def test_v2_may_take_any_contour_and_v1_the_largest_only():
    values = blob(2, 2, 22, 22) + blob(30, 30, 36, 36)
    made = evaluator()
    made.update(values[None], logits(0), torch.tensor([0]), [np.array([[30, 30, 36, 36]])])
    found = made.compute(0.2)
    assert (found["max_box_acc"], found["max_box_acc_v2"]) == (0, 1)
    assert found["by_delta"] == {"0.3": 1.0, "0.5": 1.0, "0.7": 1.0}


def literal_max_box_acc(
    maps: np.ndarray, truths: list[np.ndarray], taus: np.ndarray, delta: float, any_: bool
):
    """Written out as published: threshold, trace, overlap, for each image and tau."""
    hits = np.zeros(len(taus))
    for values, truth in zip(maps, truths, strict=True):
        scaled = (values - values.min()) / (values.max() - values.min())
        gray = (scaled * 255).astype(np.uint8)
        for number, tau in enumerate(taus):
            _, binary = cv2.threshold(gray, int(tau * gray.max()), 255, cv2.THRESH_BINARY)
            contours = list(cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0])
            if not any_:
                contours = [max(contours, key=cv2.contourArea)]
            best = 0.0
            for contour in contours:
                x, y, w, h = cv2.boundingRect(contour)
                x1, y1 = min(x + w, SIDE - 1), min(y + h, SIDE - 1)
                for a, b, c, d in truth:
                    inner = max(0, min(x1, c) - max(x, a) + 1) * max(0, min(y1, d) - max(y, b) + 1)
                    union = (x1 - x + 1) * (y1 - y + 1) + (c - a + 1) * (d - b + 1) - inner
                    best = max(best, inner / union)
            hits[number] += best >= delta
    return hits / len(maps)


def test_curves_are_those_of_contours_traced_at_each_threshold():
    generator = np.random.default_rng(0)
    maps = np.stack([cv2.resize(generator.random((6, 6)), (SIDE, SIDE)) for _ in range(6)])
    truths = [
        np.sort(generator.integers(0, SIDE, (2, 2, 2)), axis=1).reshape(2, 4) + np.array([0, 0, 1, 1])
        for _ in maps
    ]
    taus = np.arange(0, 1, 0.05)
    made = WSOLEvaluator("full", contour_thresholds=taus)
    made.update(torch.from_numpy(maps), logits(*[0] * 6), torch.zeros(6, dtype=torch.long), truths)
    found = made.compute(0.2)
    v2 = []
    for number, delta in enumerate((0.3, 0.5, 0.7)):
        largest, every = (literal_max_box_acc(maps, truths, taus, delta, any_) for any_ in (False, True))
        assert found["curves"]["largest"][number] == largest.tolist()
        assert found["curves"]["any"][number] == every.tolist()
        v2.append(every.max())
    assert found["max_box_acc_v2"] == pytest.approx(np.mean(v2))


def test_the_baselines_that_need_no_map_are_always_there():
    made = evaluator(contours=False)
    truths = [np.array([[0, 0, 38, 38]]), np.array([[8, 8, 32, 32]])]
    made.update(torch.stack([blob(0, 0, 3, 3)] * 2), logits(0, 1), torch.tensor([0, 0]), truths)
    found = made.compute(0.2)
    assert found["whole_crop"] == {"top1_loc": 0.5, "top5_loc": 0.5, "gt_known": 0.5}
    assert found["center_box"] == {"top1_loc": 0.5, "top5_loc": 1.0, "gt_known": 1.0}
    assert found["gt_known"] == 0


def test_the_threshold_is_chosen_on_other_images_unless_asked():
    made = evaluator(contours=False)
    values = blob(4, 4, 36, 36) * 0.3
    values[10:16, 10:16] = 1.0
    made.update(values[None], logits(0), torch.tensor([0]), [np.array([[10, 10, 16, 16]])])
    assert made.best_threshold() == pytest.approx(0.3, abs=0.011)
    assert made.compute(0.1)["gt_known"] == 0
    assert made.compute("oracle")["gt_known"] == 1
    assert "oracle" in made.compute("oracle")["threshold_from"]


def test_a_map_that_shows_nothing_is_counted_and_gets_the_whole_image():
    made = evaluator()
    truth = [np.array([[0, 0, 40, 40]])]
    for values in (torch.full((1, SIDE, SIDE), 0.5), torch.full((1, SIDE, SIDE), float("nan"))):
        made.update(values, logits(0), torch.tensor([0]), truth)
    found = made.compute(0.1)
    assert (found["no_map"], found["gt_known"], found["max_box_acc_v2"]) == (2, 1.0, 0.0)


def test_pxap_is_sklearns_average_precision_over_all_pixels():
    generator = np.random.default_rng(1)
    maps, masks = generator.random((3, 9, 9)), generator.integers(0, 2, (3, 9, 9))
    masks[0, :2] = 255
    made = PixelAveragePrecision(50)
    made.update(torch.from_numpy(maps), torch.from_numpy(masks))
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    scores = np.minimum((maps - low) / (high - low) * 50, 49).astype(int)
    counted = masks != 255
    assert made.compute() == pytest.approx(average_precision_score(masks[counted], scores[counted]))


def test_bad_input_is_said():
    made = evaluator()
    with pytest.raises(InputError, match="no image was evaluated"):
        made.compute(0.2)
    with pytest.raises(InputError, match="a map, logits, a label and boxes"):
        made.update(blob(0, 0, 3, 3)[None], logits(0), torch.tensor([0]), [])
    made.update(blob(0, 0, 3, 3)[None], logits(0), torch.tensor([0]), [np.empty((0, 4))])
    with pytest.raises(InputError, match="no image has a box"):
        made.best_threshold()
    with pytest.raises(InputError, match="threshold: was not counted"):
        made.compute(0.123)
    with pytest.raises(InputError, match="no pixel belongs to an object"):
        PixelAveragePrecision().compute()
    with pytest.raises(InputError, match="masks: expected 0, 1 and 255"):
        PixelAveragePrecision().update(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 7))
