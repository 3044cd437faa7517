"""How much each channel of a group matters.

A criterion takes the evidence (the model and what images say about it) and a group, and returns `importance_C`, one non-negative
float32 score a channel, on the CPU. But for `obs`, whose scores are errors and comparable as they are, scores are divided by the
group's mean: magnitudes differ by layer for reasons that have nothing to do with importance (fan-in, resolution), and a global
ranking of raw ones empties the early layers. Equal scores are left equal: the budget breaks ties by position. `choices.CRITERIA`
names them.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.graph import Group
from yolo_compress.recipe import choices

Criterion = Callable[[Evidence, Group], Tensor]
KNOB = "prune.criterion"


def bn_gamma(evidence: Evidence, group: Group) -> Tensor:
    """Mean |gamma| of the BatchNorms on the channel: Network Slimming (Liu et al., arXiv 1708.06519).

    Raises:
        NumericsError: a gamma is NaN or infinite; names the layer.
    """
    scores = []
    for member in group.having("norm"):
        gamma_C = evidence.model.get_submodule(member.module).weight.detach()
        gamma_C = gamma_C[member.offset : member.offset + group.width]
        scores.append(_finite(gamma_C.float().cpu().abs(), member.module, "gamma"))
    return _normalised(torch.stack(scores))


def l1(evidence: Evidence, group: Group) -> Tensor:
    """Sum of |weight| of the filters that write the channel (Li et al., arXiv 1608.08710, section 3.1).

    Raises:
        NumericsError: a weight is NaN or infinite; names the layer.
    """
    return _of_filters(evidence.model, group, lambda filters: torch.linalg.vector_norm(filters, ord=1, dim=1))


def l2(evidence: Evidence, group: Group) -> Tensor:
    """Euclidean norm of the filters that write the channel (as in He et al., Soft Filter Pruning, arXiv 1808.06866, equation 2).

    Raises:
        NumericsError: a weight is NaN or infinite; names the layer.
    """
    return _of_filters(evidence.model, group, lambda filters: torch.linalg.vector_norm(filters, ord=2, dim=1))


def fpgm(evidence: Evidence, group: Group) -> Tensor:
    """Sum of distances to the other filters: near the geometric median, others can stand in (He et al., arXiv 1811.00250).

    Raises:
        NumericsError: a weight is NaN or infinite; names the layer.
    """
    return _of_filters(evidence.model, group, lambda filters: torch.cdist(filters, filters).sum(1))


def lamp(evidence: Evidence, group: Group) -> Tensor:
    """Share of the filter's energy in that of all no smaller ones (LAMP for channels; Lee et al., arXiv 2010.07611, equation 1).

    Raises:
        NumericsError: a weight is NaN or infinite; names the layer.
    """
    return _of_filters(evidence.model, group, _lamp)


def taylor(evidence: Evidence, group: Group) -> Tensor:
    """Squared first-order change of the loss without the channel (Molchanov et al., arXiv 1906.10771, equation 8, BN gates).

    Raises:
        DataError, NumericsError: see `Evidence.gradients`.
    """
    return _of_modules(evidence.gradients.gate, group, "norm")


def hessian(evidence: Evidence, group: Group) -> Tensor:
    """Second-order change of the loss without the filter, its Hessian the diagonal of the empirical Fisher information.

    Optimal Brain Damage (LeCun et al., 1989) with the estimate of Theis et al. (arXiv 1801.05787, equation 6).

    Raises:
        DataError, NumericsError: see `Evidence.gradients`.
    """
    return _of_modules(evidence.gradients.fisher, group, "out")


def activation(evidence: Evidence, group: Group) -> Tensor:
    """Standard deviation of the channel where it is read: one that never varies says nothing (as Hu et al., arXiv 1607.03250).

    Raises:
        DataError, NumericsError: see `Evidence.moments`.
    """
    deviation = {name: own.cov_CC.diagonal().clamp_min(0).sqrt() for name, own in evidence.moments.items()}
    return _of_modules(deviation, group, "in")


def random(evidence: Evidence, group: Group) -> Tensor:
    """Uniform noise, the control that every criterion has to beat (Mittal et al., arXiv 1801.10447); same for one seed and name."""
    generator = torch.Generator().manual_seed(crc32(f"{evidence.seed}:{group.name}".encode()))
    return _normalised(torch.rand(1, group.width, generator=generator))


def scores(evidence: Evidence, criterion: Criterion) -> dict[str, Tensor]:
    """Importance of every group by name."""
    return {group.name: criterion(evidence, group) for group in evidence.groups}


def find(name: str) -> Criterion:
    """A criterion by its name in `choices.CRITERIA`, or a user's own as `file.py:function`.

    Raises:
        RecipeError: No such name, file or function, or it is no function of `(evidence, group)`.
    """
    criterion: Criterion = choices.find(choices.CRITERIA, name, KNOB)
    choices.check_signature(criterion, ("evidence", "group"), name, KNOB)
    return criterion


def _of_filters(model: nn.Module, group: Group, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """`measure` of the filters that write the group: filters_CN -> score_C."""
    measured = []
    for member in group.having("out"):
        weight = model.get_submodule(member.module).weight.detach()[member.offset : member.offset + group.width]
        filters_CN = weight.float().cpu().flatten(1)
        _finite(filters_CN.abs().amax(1), member.module, "weight")
        measured.append(measure(filters_CN))
    return _normalised(torch.stack(measured))


def _of_modules(values: dict[str, Tensor], group: Group, role: str) -> Tensor:
    """Scores that stand by module, cut to the group."""
    members = [member for member in group.members if member.role == role]
    parts = [values[member.module][member.offset : member.offset + group.width] for member in members]
    return _normalised(torch.stack(parts).float())


def _lamp(filters_CN: Tensor) -> Tensor:
    energy_C, order = filters_CN.square().sum(1).sort()
    share_C = energy_C / energy_C.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(energy_C.dtype).tiny)
    return torch.empty_like(share_C).scatter_(0, order, share_C)


def _normalised(scores_MC: Tensor) -> Tensor:
    """Mean over the members of a group, each divided by its own mean; all zeros stay zeros.

    A member whose channels are all dead says nothing about which to keep, and must not turn into NaN.
    """
    mean_M1 = scores_MC.mean(1, keepdim=True)
    tiny = torch.finfo(scores_MC.dtype).tiny
    per_member_MC = torch.where(mean_M1 > tiny, scores_MC / mean_M1.clamp_min(tiny), torch.zeros_like(scores_MC))
    return per_member_MC.mean(0)


def _finite(score_C: Tensor, module: str, what: str) -> Tensor:
    bad = (~torch.isfinite(score_C)).nonzero().flatten()
    if len(bad):
        raise NumericsError(f"prune: {what} of {module} is NaN or infinite in {len(bad)} of {len(score_C)} channels")
    return score_C
