"""Rewards of a look, from the classifier's logits before and after it. Cross-entropy takes logits, not p."""

from typing import Literal, get_args

from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared_core import InputError

Reward = Literal["terminal", "neg_ce", "delta_ce"]


def reward_of(
    kind: Reward,
    before: Float[Tensor, "batch classes"],
    after: Float[Tensor, "batch classes"],
    label: Int64[Tensor, " batch"],
    done: Bool[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """The reward of each slide's step.

    | kind | r_t |
    | --- | --- |
    | `terminal` | 1 at the end where the most likely class is right, else 0; the paper's |
    | `neg_ce` | -CE(logits after, label) |
    | `delta_ce` | CE(before) - CE(after); adds up to CE_0 - CE_T over an episode |

    Args:
        kind: As above.
        before: The classifier's logits before the look.
        after: Logits after it.
        label: The right class.
        done: Whether the look was the last.
    """
    if kind == "terminal":
        return (done & (after.argmax(dim=-1) == label)).to(after.dtype)
    loss = cross_entropy(after, label, reduction="none")
    if kind == "neg_ce":
        return -loss
    return cross_entropy(before, label, reduction="none") - loss


def default_discount(kind: Reward) -> float:
    """0.99 as in the released code; 1 for `delta_ce`, which only then adds up to the whole improvement."""
    return 1.0 if kind == "delta_ce" else 0.99


def check_reward(kind: str) -> None:
    """Raise InputError unless `kind` is one of the rewards."""
    if kind not in get_args(Reward):
        raise InputError(f"expected one of {', '.join(get_args(Reward))}", field="reward", value=kind)
