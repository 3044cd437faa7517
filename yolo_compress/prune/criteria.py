"""Pruning criteria: functions that score how important each channel of a channel group is.

A criterion takes the `Evidence` (the model and its statistics on calibration images) and a channel group. It returns
`importance_C`, one non-negative float32 score per channel, on the CPU. `choices.CRITERIA` lists the criteria.

Scores are divided by the mean score of the group. Magnitudes depend on fan-in and resolution, so a global ranking of raw magnitudes
would remove the early layers. The scores of `obs` are output errors, which are comparable without this division. If channels have
equal scores, `budget.choose` keeps the first of them.
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
    """Score a channel by the mean |gamma| of its BatchNorms: Network Slimming (Liu et al., arXiv 1708.06519).

    Raises:
        NumericsError: A gamma is NaN or infinite.
    """
    scores = []
    for member in group.having("norm"):
        gamma_C = evidence.model.get_submodule(member.module).weight.detach()
        gamma_C = gamma_C[member.offset : member.offset + group.width]
        scores.append(_check_finite(gamma_C.float().cpu().abs(), member.module, "gamma"))
    return _normalised(torch.stack(scores))


def l1(evidence: Evidence, group: Group) -> Tensor:
    """Score a channel by the sum of |weight| of the filters that write it (Li et al., arXiv 1608.08710, section 3.1).

    Raises:
        NumericsError: A weight is NaN or infinite.
    """
    return _filter_scores(evidence.model, group, lambda filters: torch.linalg.vector_norm(filters, ord=1, dim=1))


def l2(evidence: Evidence, group: Group) -> Tensor:
    """Score a channel by the L2 norm of the filters that write it, as Soft Filter Pruning (arXiv 1808.06866, equation 2).

    Raises:
        NumericsError: A weight is NaN or infinite.
    """
    return _filter_scores(evidence.model, group, lambda filters: torch.linalg.vector_norm(filters, ord=2, dim=1))


def fpgm(evidence: Evidence, group: Group) -> Tensor:
    """Score a filter by the sum of its distances to the other filters (FPGM; He et al., arXiv 1811.00250).

    A filter near the geometric median can be replaced by the others.

    Raises:
        NumericsError: A weight is NaN or infinite.
    """
    return _filter_scores(evidence.model, group, lambda filters: torch.cdist(filters, filters).sum(1))


def lamp(evidence: Evidence, group: Group) -> Tensor:
    """Score a filter by its energy (sum of squared weights) divided by the energy of all filters with at least this energy.

    This is LAMP (Lee et al., arXiv 2010.07611, equation 1) applied to channels instead of weights.

    Raises:
        NumericsError: A weight is NaN or infinite.
    """
    return _filter_scores(evidence.model, group, _lamp)


def taylor(evidence: Evidence, group: Group) -> Tensor:
    """Score a channel by the squared first-order change of the loss if it is removed.

    The method is equation 8 of Molchanov et al., arXiv 1906.10771, with gates after BatchNorm.

    Raises:
        DataError, NumericsError: See `Evidence.gradients`.
    """
    return _module_scores(evidence.gradients.gate, group, "norm")


def hessian(evidence: Evidence, group: Group) -> Tensor:
    """Score a filter by the second-order change of the loss if it is removed.

    This is Optimal Brain Damage (LeCun et al., 1989). The Hessian is estimated by the diagonal of the empirical Fisher
    information (Theis et al., arXiv 1801.05787, equation 6).

    Raises:
        DataError, NumericsError: See `Evidence.gradients`.
    """
    return _module_scores(evidence.gradients.fisher, group, "out")


def activation(evidence: Evidence, group: Group) -> Tensor:
    """Score a channel by the standard deviation of its values, as its next layers read them (after Hu et al., arXiv 1607.03250).

    A constant channel carries no information.

    Raises:
        DataError, NumericsError: See `Evidence.moments`.
    """
    deviation = {name: moments.cov_CC.diagonal().clamp_min(0).sqrt() for name, moments in evidence.moments.items()}
    return _module_scores(deviation, group, "in")


def random(evidence: Evidence, group: Group) -> Tensor:
    """Score channels at random, as a control for other criteria (Mittal et al., arXiv 1801.10447).

    The scores depend only on the seed and the name of the group.
    """
    generator = torch.Generator().manual_seed(crc32(f"{evidence.seed}:{group.name}".encode()))
    return _normalised(torch.rand(1, group.width, generator=generator))


def scores(evidence: Evidence, criterion: Criterion) -> dict[str, Tensor]:
    """Return group name -> importance of each channel, for every group of the model."""
    return {group.name: criterion(evidence, group) for group in evidence.groups}


def find(name: str) -> Criterion:
    """Return the criterion called `name`: a name in `choices.CRITERIA`, or `file.py:function` for a user's own function.

    Raises:
        RecipeError: There is no such name, file or function, or the function does not take `(evidence, group)`.
    """
    criterion: Criterion = choices.find(choices.CRITERIA, name, KNOB)
    choices.check_signature(criterion, ("evidence", "group"), name, KNOB)
    return criterion


def _filter_scores(model: nn.Module, group: Group, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the scores of a group's channels, computed from the filters that write the channels.

    Args:
        measure: Function that maps filters_CN to score_C.
    """
    measured = []
    for member in group.having("out"):
        weight = model.get_submodule(member.module).weight.detach()[member.offset : member.offset + group.width]
        filters_CN = weight.float().cpu().flatten(1)
        _check_finite(filters_CN.abs().amax(1), member.module, "weight")
        measured.append(measure(filters_CN))
    return _normalised(torch.stack(measured))


def _module_scores(values: dict[str, Tensor], group: Group, role: str) -> Tensor:
    """Return the scores of a group's channels, averaged over its members that have the role `role`.

    Args:
        values: Module name -> score of each channel of the module.
    """
    members = [member for member in group.members if member.role == role]
    parts = [values[member.module][member.offset : member.offset + group.width] for member in members]
    return _normalised(torch.stack(parts).float())


def _lamp(filters_CN: Tensor) -> Tensor:
    energy_C, order = filters_CN.square().sum(1).sort()
    share_C = energy_C / energy_C.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(energy_C.dtype).tiny)
    return torch.empty_like(share_C).scatter_(0, order, share_C)


def _normalised(scores_MC: Tensor) -> Tensor:
    """Divide the scores of each member by their mean, and return the mean over members.

    If all scores of a member are 0, they stay 0 instead of NaN. The other members then decide the order.
    """
    mean_M1 = scores_MC.mean(1, keepdim=True)
    tiny = torch.finfo(scores_MC.dtype).tiny
    per_member_MC = torch.where(mean_M1 > tiny, scores_MC / mean_M1.clamp_min(tiny), torch.zeros_like(scores_MC))
    return per_member_MC.mean(0)


def _check_finite(score_C: Tensor, module: str, what: str) -> Tensor:
    bad = (~torch.isfinite(score_C)).nonzero().flatten()
    if len(bad):
        raise NumericsError(
            f"prune: {what} of {module} is NaN or infinite in {len(bad)} of {len(score_C)} channels; check the model"
        )
    return score_C
