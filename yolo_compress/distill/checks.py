"""Proof that distillation is active: what must hold of every term at the first batch and over every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError

# Gradients in half precision that are small would read as none; GradScaler starts at the same factor.
SCALE = 2.0**16


def prove(terms: Mapping[str, Tensor], student: Sequence[Tensor], same: bool) -> None:
    """Check each term of one batch: finite, not 0 unless the nets are the same, with a gradient to the student.

    The gradient is taken down to the student's outputs and taps only, so this costs the backward pass of the terms alone.

    Args:
        terms: By name, in the graph.
        student: Tensors of the student that terms depend on.
        same: Whether student and teacher have the same weights.

    Raises:
        NumericsError: Names the term and what it lacks.
    """
    for name, term in terms.items():
        if not bool(torch.isfinite(term)):
            raise NumericsError(
                f"distill: {name} is {float(term.detach())} at the first batch; check the teacher's weights"
            )
        if float(term.detach()) == 0.0:
            if same:
                continue  # a whole epoch of it will be refused
            raise NumericsError(
                f"distill: {name} is 0 at the first batch although teacher and student differ: it teaches nothing. Take "
                "other layers or another feature_loss, or set its weight to 0"
            )
        gradients = (
            torch.autograd.grad(term * SCALE, student, retain_graph=True, allow_unused=True)
            if term.requires_grad
            else ()
        )
        if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            raise NumericsError(
                f"distill: {name} sends no gradient to the student at the first batch: it teaches nothing"
            )


def prove_frozen(teacher: nn.Module) -> None:
    """Assert that a frozen teacher takes no gradient and that its BatchNorm stays."""
    learning = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    moving = [
        name for name, module in teacher.named_modules() if isinstance(module, nn.BatchNorm2d) and module.training
    ]
    if learning or moving:
        raise AssertionError(f"the teacher is not frozen: {[*learning, *moving][:3]} would change")


def prove_heard(totals: Mapping[str, Tensor], epoch: int) -> None:
    """Check the sums of the terms over an epoch (counted from 0).

    Raises:
        NumericsError: A term was 0 in every batch.
    """
    silent = [name for name, total in totals.items() if float(total) == 0.0]
    if silent:
        raise NumericsError(
            f"{', '.join(silent)} was 0 in every batch of epoch {epoch + 1}: teacher and student are the same net, "
            "or the teacher sees nothing in these images"
        )


def same_weights(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether two nets have equal parameters, wherever and in whatever precision they are."""
    own, other = dict(student.named_parameters()), dict(teacher.named_parameters())
    return own.keys() == other.keys() and all(
        own[name].shape == other[name].shape and torch.equal(own[name].cpu().float(), other[name].cpu().float())
        for name in own
    )
