"""How good the answers are and what they cost: AUC with an interval, accuracy, F1, shares that were read."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64

from shared_core import InputError


def auc(probability: Float[np.ndarray, "slides classes"], label: Int64[np.ndarray, " slides"]) -> float:
    """Area under the ROC curve: of class 1 for two classes, the mean of one against the rest for more.

    By ranks (Mann and Whitney), ties count half.

    Raises:
        InputError: Some class has no slide, or all slides; the area is not defined then.
    """
    classes = probability.shape[1]
    absent = [c for c in range(classes) if not 0 < int((label == c).sum()) < len(label)]
    if absent:
        raise InputError(
            f"AUC is not defined where a class has no slide or all of them; slides a class: "
            f"{np.bincount(label, minlength=classes).tolist()}"
        )
    if classes == 2:
        return _binary_auc(probability[:, 1], label == 1)
    return float(np.mean([_binary_auc(probability[:, c], label == c) for c in range(classes)]))


def auc_interval(
    probability: Float[np.ndarray, "slides classes"],
    label: Int64[np.ndarray, " slides"],
    draws: int = 1000,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> tuple[float, float]:
    """A 95 % bootstrap interval (percentiles) of the AUC.

    Args:
        probability: Of each class.
        label: The right classes.
        draws: Bootstrap samples; those where a class is missing are drawn again.
        seed: Which samples.
        groups: The patient of each slide: patients are drawn then, with all their slides.
    """
    auc(probability, label)  # says what is wrong, if it is
    rng = np.random.default_rng(seed)
    names = np.asarray([str(index) for index in range(len(label))] if groups is None else list(groups))
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    found: list[float] = []
    for _ in range(20 * draws):
        if len(found) == draws:
            break
        drawn = np.concatenate([members[index] for index in rng.integers(len(members), size=len(members))])
        if len(np.unique(label[drawn])) == probability.shape[1]:
            found.append(auc(probability[drawn], label[drawn]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def accuracy(probability: Float[np.ndarray, "slides classes"], label: Int64[np.ndarray, " slides"]) -> float:
    """Share of slides whose most likely class is right."""
    return float((probability.argmax(axis=1) == label).mean())


def f1(probability: Float[np.ndarray, "slides classes"], label: Int64[np.ndarray, " slides"]) -> float:
    """F1 of class 1 for two classes, the mean over classes for more; 0 where nothing is found or there."""
    predicted, classes = probability.argmax(axis=1), probability.shape[1]
    return float(
        np.mean([_f1(predicted == c, label == c) for c in ([1] if classes == 2 else range(classes))])
    )


def hit_rate(paths: Sequence[Sequence[int]], lesions: Sequence[Bool[np.ndarray, " _"]]) -> float | None:
    """Share of slides with lesions where at least one region with lesion is on the path; None without any.

    Args:
        paths: Indices of the regions that were looked at.
        lesions: For each slide, which regions hold lesion (`Annotations.hits`).
    """
    hits = [
        bool(mask[list(path)].any()) for path, mask in zip(paths, lesions, strict=True) if bool(mask.any())
    ]
    return float(np.mean(hits)) if hits else None


def _binary_auc(score: Float[np.ndarray, " slides"], positive: Bool[np.ndarray, " slides"]) -> float:
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    rank = (ends - (counts - 1) / 2)[inverse]
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m))


def _f1(predicted: Bool[np.ndarray, " slides"], right: Bool[np.ndarray, " slides"]) -> float:
    both = int((predicted & right).sum())
    return 2 * both / max(1, int(predicted.sum()) + int(right.sum()))
