"""What teachers and students are trained by (sections 3.6 and 3.7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kdcicam import functional
from kdcicam.functional import LAST_RANKS, Combination
from kdcicam.model import CICAM, CICAMOutput, check_labels
from shared_core import InputError

KL = Literal["standard", "released"]
Auxiliary = Literal["none", "fore", "diff_aux"]
LABEL_ONLY, CLS_TEACHER, LOC_TEACHER = 0, 1, 2
"""Flags of images: no teacher, the classification teacher, the localization teacher."""


def distillation(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    temperature: float,
    kl: KL = "standard",
    t_squared: bool = False,
) -> Float[Tensor, ""]:
    """Follow the teacher's class distribution, averaged over the images.

    ``standard``: KL(teacher || student) of the distributions softmax(z / T), as the paper's text has it.
    ``released``: what the authors' released code computes, which gives KL's second argument as probabilities
    where log-probabilities belong: sum p_teacher (log p_teacher - p_student). Its gradient is that of
    -p_teacher p_student, hundreds of times smaller at 200 classes and T = 15.

    Args:
        student: Logits.
        teacher: Logits; no gradient goes there.
        temperature: T.
        kl: Which.
        t_squared: Multiply by T^2 (Hinton's), which keeps the gradient's size as T grows. The method
            has it not.

    >>> z = torch.tensor([[1.0, 2.0, 3.0]])
    >>> distillation(z, z, 15.0).item()
    0.0
    """
    if kl not in get_args(KL):
        raise InputError(f"expected one of {', '.join(get_args(KL))}", field="kl", value=kl)
    if temperature <= 0:
        raise InputError("expected a number above 0", field="temperature", value=temperature)
    target = (teacher.detach().float() / temperature).softmax(1)
    scaled = student.float() / temperature
    given = scaled.log_softmax(1) if kl == "standard" else scaled.softmax(1)
    loss = F.kl_div(given, target, reduction="batchmean")
    return loss * temperature**2 if t_squared else loss


def map_distance(
    student: Float[Tensor, "batch classes h w"],
    teacher: Float[Tensor, "batch classes h w"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Mean squared error between sigmoid(M'/T) of student and teacher, over all classes and cells."""
    if student.shape != teacher.shape:
        raise InputError(
            f"the teacher's maps are {tuple(teacher.shape)}: expected the student's classes and map size",
            field="teacher",
            value=tuple(student.shape),
        )
    return F.mse_loss(
        (student.float() / temperature).sigmoid(), (teacher.detach().float() / temperature).sigmoid()
    )


@dataclass(frozen=True)
class TwoTeacherLoss:
    """L = (1 - alpha) CE(z', label) + alpha L_cls(I1) + alpha beta L_loc(I2).

    Each image belongs to no teacher (flag 0), to the classification teacher (1) or to the localization
    teacher (2). A teacher's term is a mean over its own images, and is left out where it has none in the
    batch.

    Args:
        alpha: Weight of the teachers.
        T_cls: Temperature of the class distributions: 15 in the paper for CUB, 1.1 for ImageNet.
        T_loc: Temperature of the maps' sigmoids.
        beta: Weight of the maps.
        kl: ``standard`` or ``released``; see `distillation`.
        t_squared: See `distillation`.
    """

    alpha: float = 0.8
    T_cls: float = 15.0
    T_loc: float = 15.0
    beta: float = 1.0
    kl: KL = "standard"
    t_squared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError("expected 0 to 1", field="alpha", value=self.alpha)
        for name in ("T_cls", "T_loc"):
            if getattr(self, name) <= 0:
                raise InputError("expected a number above 0", field=name, value=getattr(self, name))
        if self.kl not in get_args(KL):
            raise InputError(f"expected one of {', '.join(get_args(KL))}", field="kl", value=self.kl)

    def __call__(
        self,
        student: CICAMOutput,
        labels: Int[Tensor, " batch"],
        flags: Int[Tensor, " batch"],
        cls_out: CICAMOutput | None = None,
        loc_out: CICAMOutput | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> dict[str, Tensor]:
        """Return the terms and their sum.

        Args:
            student: Of the whole batch.
            labels: 0 to K - 1.
            flags: 0, 1 or 2 for each image.
            cls_out: The classification teacher's output for the images of flag 1 only, in their order.
            loc_out: The localization teacher's output for the images of flag 2 only, in their order.
            shares: Factors of the two teachers' terms in the sum: in several processes, whose gradients are
                averaged, those of `flag_shares`.

        Returns:
            ``loss``, ``ce``, and where their images are in the batch ``cls`` and ``loc``.

        Raises:
            InputError: Labels or flags are out of range, or a teacher's output is of other images or classes.
        """
        check_labels(labels, student.logits.shape[1])
        if flags.numel() and not 0 <= int(flags.min()) <= int(flags.max()) <= LOC_TEACHER:
            raise InputError("expected 0, 1 or 2", field="flags", value=flags.tolist())
        terms = {"ce": F.cross_entropy(student.logits.float(), labels)}
        loss = (1 - self.alpha) * terms["ce"]
        if cls_out is not None and (chosen := flags == CLS_TEACHER).any():
            logits = student.logits[chosen]
            _same_shape(cls_out.logits, logits, "cls_out")
            terms["cls"] = distillation(logits, cls_out.logits, self.T_cls, self.kl, self.t_squared)
            loss = loss + self.alpha * shares[0] * terms["cls"]
        if loc_out is not None and (chosen := flags == LOC_TEACHER).any():
            _same_shape(loc_out.feature[:, 0], student.feature[chosen, 0], "loc_out")
            _same_shape(loc_out.logits, student.logits[chosen], "loc_out")
            maps = functional.class_maps(student.feature[chosen], student.weight)
            terms["loc"] = map_distance(maps, loc_out.cam, self.T_loc)
            loss = loss + self.alpha * self.beta * shares[1] * terms["loc"]
        return {"loss": loss, **terms}


def flag_shares(flags: Int[Tensor, " batch"]) -> tuple[float, float]:
    """How much more than an even share of the teachers' images this process has; 1 and 1 in a single one.

    A term is a mean over the images of its flag. Processes have unlike numbers of them, so the mean of their
    means is not that over the whole batch; with these factors it is.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return 1.0, 1.0
    own = torch.stack([(flags == flag).sum() for flag in (CLS_TEACHER, LOC_TEACHER)]).float()
    total = own.clone()
    dist.all_reduce(total)
    cls, loc = (own * dist.get_world_size() / total.clamp(min=1)).tolist()
    return cls, loc


def _same_shape(theirs: Tensor, ours: Tensor, name: str) -> None:
    if theirs.shape != ours.shape:
        raise InputError(
            f"does not fit the student's {tuple(ours.shape)}: a teacher has "
            "the student's classes and map size, and sees the images of its flag only",
            field=name,
            value=tuple(theirs.shape),
        )


def foreground(
    out: CICAMOutput, size: tuple[int, int], threshold: float, combine: Combination, last: int
) -> Bool[Tensor, "batch height width"]:
    """F: where the upsampled combinational map of the de-biased branch is above threshold * its maximum."""
    maps = functional.upsampled(out.combined(combine, last).detach(), size)
    return maps > threshold * maps.amax((1, 2), keepdim=True)


@dataclass(frozen=True)
class ClassifierLoss:
    """The loss of CI-CAM and of both teachers.

    L = CE(z, label) + CE(z', label) + eta * auxiliary + rho * area.

    Args:
        auxiliary: ``none`` (CI-CAM); ``fore``: CE(u_f); ``diff_aux``: CE(u_f - u_b) + CE(((u_f - u_b)
            + z')/2), where u_f and u_b are the context-free logits of the image with only its foreground or
            only the rest.
        eta: Weight of the auxiliary terms.
        area: rho, weight of the mean of the combinational map.
        area_mode: 1 takes the map as it is, 2 after upsampling to the image.
        threshold: Of the foreground, as a share of the map's maximum.
    """

    auxiliary: Auxiliary = "none"
    eta: float = 1.0
    area: float = 0.0
    area_mode: Literal[1, 2] = 2
    threshold: float = 0.0
    both: bool = field(default=True)
    """Whether both branches have a loss; NL-CCAM has one branch only."""

    def __post_init__(self) -> None:
        if self.auxiliary not in get_args(Auxiliary):
            raise InputError(
                f"expected one of {', '.join(get_args(Auxiliary))}", field="auxiliary", value=self.auxiliary
            )
        if self.area_mode not in (1, 2):
            raise InputError("expected 1 or 2", field="area_mode", value=self.area_mode)
        if not 0 <= self.threshold < 1:
            raise InputError("expected 0 to below 1", field="threshold", value=self.threshold)

    def __call__(
        self,
        model: CICAM,
        out: CICAMOutput,
        images: Float[Tensor, "batch 3 height width"],
        labels: Int[Tensor, " batch"],
    ) -> dict[str, Tensor]:
        """Return the terms and their sum, ``loss``.

        Args:
            model: For the passes over foreground and ground.
            out: The model's output for the images.
            images: The batch.
            labels: 0 to K - 1.
        """
        check_labels(labels, out.logits.shape[1])
        terms = {"ce": F.cross_entropy(out.logits.float(), labels)}
        if self.both:
            terms["ce_raw"] = F.cross_entropy(out.logits_raw.float(), labels)
        loss = torch.stack(list(terms.values())).sum()
        if self.auxiliary != "none":
            terms["aux"] = self._auxiliary(model, out, images, labels)
            loss = loss + self.eta * terms["aux"]
        if self.area:
            terms["area"] = area(out, _size(images), self.area_mode, model.combine, model.last)
            loss = loss + self.area * terms["area"]
        return {"loss": loss, **terms}

    def _auxiliary(self, model: CICAM, out: CICAMOutput, images: Tensor, labels: Tensor) -> Tensor:
        mask = foreground(out, _size(images), self.threshold, model.combine, model.last)[:, None]
        if self.auxiliary == "fore":
            return F.cross_entropy(model.raw_logits(images * mask).float(), labels)
        # One pass for both: BatchNorm sees foregrounds and grounds together.
        u_f, u_b = model.raw_logits(torch.cat([images * mask, images * ~mask])).float().chunk(2)
        difference = u_f - u_b
        mixed = (difference + out.logits.float()) / 2
        return F.cross_entropy(difference, labels) + F.cross_entropy(mixed, labels)


def area(
    out: CICAMOutput, size: tuple[int, int], mode: Literal[1, 2], combine: Combination, last: int = LAST_RANKS
) -> Float[Tensor, ""]:
    """Mean of the combinational map less its minimum; mode 2: after upsampling to the image."""
    maps = out.combined(combine, last).float()
    if mode == 2:
        return functional.upsampled(maps, size).mean()
    return (maps - maps.amin((1, 2), keepdim=True)).mean()


class Teachers(nn.Module):
    """The frozen teachers. Each sees only the images of its own flag.

    Args:
        cls: The classification teacher.
        loc: The localization teacher.
        student: Checked against: same classes and map size.

    Raises:
        InputError: A teacher does not fit the student.
    """

    def __init__(self, cls: CICAM | None, loc: CICAM | None, student: CICAM) -> None:
        super().__init__()
        for name, teacher in (("cls", cls), ("loc", loc)):
            if teacher is None:
                continue
            for what in ("num_classes", "map_size"):
                ours, theirs = getattr(student, what), getattr(teacher, what)
                if ours != theirs:
                    raise InputError(
                        f"a teacher needs the student's {what} {ours}", field=f"{name} teacher", value=theirs
                    )
        self.cls, self.loc = cls, loc
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Teachers:
        """Stay in evaluation mode, whatever the module around is set to."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "batch 3 height width"], flags: Int[Tensor, " batch"]
    ) -> tuple[CICAMOutput | None, CICAMOutput | None]:
        """What each teacher says of its own images; None where it has none here."""
        given = []
        for teacher, flag in ((self.cls, CLS_TEACHER), (self.loc, LOC_TEACHER)):
            chosen = images[flags == flag] if teacher is not None else images[:0]
            given.append(teacher(chosen) if teacher is not None and len(chosen) else None)
        return given[0], given[1]


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]
