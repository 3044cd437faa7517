"""Check that every distillation loss has an effect on the student, at the first batch and in every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError

# Without this factor small gradients become 0 in half precision. GradScaler starts with the same value.
SCALE = 2.0**16


def check_terms(terms: Mapping[str, Tensor], student: Sequence[Tensor], same: bool) -> None:
    """Check the loss terms of one batch: each must be finite, not 0, and have a gradient to the student.

    The backward pass stops at the tensors in `student`, so it is fast.

    Args:
        terms: Name -> loss term, with gradient.
        student: Tensors of the student on which the terms depend: its head outputs and its tapped feature maps.
        same: True if student and teacher have equal weights. Terms may then be 0.

    Raises:
        NumericsError: A term is 0 or not finite, or has no gradient to the student.
    """
    for name, term in terms.items():
        if not bool(torch.isfinite(term)):
            raise NumericsError(
                f"distill: {name} is {float(term.detach())} at the first batch; check the teacher's weights"
            )
        if float(term.detach()) == 0.0:
            if same:
                continue  # `check_effect` fails if the term stays 0 for an epoch
            raise NumericsError(
                f"distill: {name} is 0 at the first batch although teacher and student differ, so it has no effect; set "
                "other layers, another feature_loss, or its weight to 0"
            )
        gradients = (
            torch.autograd.grad(term * SCALE, student, retain_graph=True, allow_unused=True)
            if term.requires_grad
            else ()
        )
        if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            raise NumericsError(
                f"distill: {name} has no gradient to the student at the first batch, so it has no effect; set other layers, "
                "another feature_loss, or its weight to 0"
            )


def check_frozen(teacher: nn.Module) -> None:
    """Assert that a frozen teacher does not change: no parameter has a gradient, and BatchNorm statistics are fixed."""
    trainable = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    updating = [
        name for name, module in teacher.named_modules() if isinstance(module, nn.BatchNorm2d) and module.training
    ]
    if trainable or updating:
        raise AssertionError(f"the teacher is not frozen: {[*trainable, *updating][:3]} would change")


def check_effect(totals: Mapping[str, Tensor], epoch: int) -> None:
    """Check that no loss term was 0 during a whole epoch.

    Args:
        totals: Name -> sum of the loss term over the epoch.
        epoch: Number of the epoch, from 0.

    Raises:
        NumericsError: A loss term was 0 in every batch.
    """
    without_effect = [name for name, total in totals.items() if float(total) == 0.0]
    if without_effect:
        raise NumericsError(
            f"distill: {', '.join(without_effect)} was 0 in every batch of epoch {epoch + 1}; teacher and student are the same "
            "model, or the teacher detects nothing in these images; use another teacher or other images"
        )


def same_weights(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether two models have equal parameters, regardless of their devices and precisions."""
    own, other = dict(student.named_parameters()), dict(teacher.named_parameters())
    return own.keys() == other.keys() and all(
        own[name].shape == other[name].shape and torch.equal(own[name].cpu().float(), other[name].cpu().float())
        for name in own
    )
