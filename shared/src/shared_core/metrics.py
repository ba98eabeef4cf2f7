"""Metrics of image classifiers, by torchmetrics where it has them.

Needs ``pip install 'shared-core[torch]'``. Importing this module imports torch: the shapes in its signatures
are checked in the tests.
"""

from collections.abc import Sequence

from shared_core.errors import needs_extra

with needs_extra("torch"):
    from jaxtyping import Float, Int
    from torch import Tensor


def classification(
    logits: Float[Tensor, "samples classes"],
    labels: Int[Tensor, " samples"],
    topk: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Top-k accuracy over all samples.

    Args:
        logits: Scores, any scale, finite.
        labels: Right classes, 0 to classes - 1.
        topk: The values of k. One above the number of classes is left out: every sample would be right.

    Returns:
        ``{"top1": share, "top5": share}``, shares from 0 to 1.

    Raises:
        ValueError: There is no sample, a score is not finite, or a label is out of range.

    >>> import torch
    >>> classification(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]), topk=(1, 2))
    {'top1': 0.5, 'top2': 1.0}
    """
    with needs_extra("torch"):  # here and not above: importing it takes seconds, and only this needs it
        from torchmetrics.functional.classification import multiclass_accuracy

    classes = logits.shape[1]
    _check_scores(logits)
    if labels.min() < 0 or labels.max() >= classes:
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {low} to {high}")
    return {
        f"top{k}": multiclass_accuracy(
            logits, labels, num_classes=classes, average="micro", top_k=k, validate_args=False
        ).item()
        for k in topk
        if k <= classes
    }


def agreement(
    logits_a: Float[Tensor, "samples classes"], logits_b: Float[Tensor, "samples classes"]
) -> float:
    """Share of samples whose highest score is at the same class in both.

    Raises:
        ValueError: There is no sample or a score is not finite.

    >>> import torch
    >>> agreement(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[5.0, 4.0], [1.0, 0.0]]))
    0.5
    """
    _check_scores(logits_a)
    _check_scores(logits_b)
    return (logits_a.argmax(1) == logits_b.argmax(1)).double().mean().item()


def _check_scores(logits: Float[Tensor, "samples classes"]) -> None:
    if logits.numel() == 0:
        raise ValueError(f"logits: expected at least one sample and class, got shape {tuple(logits.shape)}")
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite scores, got NaN or infinity")
