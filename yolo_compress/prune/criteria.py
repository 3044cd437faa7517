"""How much each channel of a group matters.

A criterion takes the model, a group and a seed and returns `importance_C`, one non-negative float32 score a channel, on the CPU.
Scores are divided by the group's mean: magnitudes differ by layer for reasons that have nothing to do with importance (fan-in,
resolution), and a global ranking of raw ones empties the early layers. Equal scores are left equal: the budget breaks ties by position.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError
from yolo_compress.prune.graph import Group

Criterion = Callable[[nn.Module, Group, int], Tensor]


def bn_gamma(model: nn.Module, group: Group, seed: int = 0) -> Tensor:
    """Mean |gamma| of the BatchNorms on the channel: Network Slimming (Liu et al., arXiv 1708.06519).

    Raises:
        NumericsError: a gamma is NaN or infinite; names the layer.
    """
    scores = []
    for member in group.having("norm"):
        gamma_C = model.get_submodule(member.module).weight.detach()[member.offset : member.offset + group.width]
        scores.append(_finite(gamma_C.float().cpu().abs(), member.module, "gamma"))
    return _normalised(torch.stack(scores))


def l1(model: nn.Module, group: Group, seed: int = 0) -> Tensor:
    """Sum of |weight| of the filters that write the channel (Li et al., arXiv 1608.08710, section 3.1).

    Raises:
        NumericsError: a weight is NaN or infinite; names the layer.
    """
    return _filter_norms(model, group, order=1)


def l2(model: nn.Module, group: Group, seed: int = 0) -> Tensor:
    """Euclidean norm of the filters that write the channel (as in He et al., Soft Filter Pruning, arXiv 1808.06866, equation 2).

    Raises:
        NumericsError: a weight is NaN or infinite; names the layer.
    """
    return _filter_norms(model, group, order=2)


def random(model: nn.Module, group: Group, seed: int = 0) -> Tensor:
    """Uniform noise, the control that every criterion has to beat (Mittal et al., arXiv 1801.10447); same for one seed and name."""
    generator = torch.Generator().manual_seed(crc32(f"{seed}:{group.name}".encode()))
    return _normalised(torch.rand(1, group.width, generator=generator))


def scores(model: nn.Module, groups: list[Group], criterion: Criterion, seed: int = 0) -> dict[str, Tensor]:
    """Importance of every group by name."""
    return {group.name: criterion(model, group, seed) for group in groups}


def _filter_norms(model: nn.Module, group: Group, order: int) -> Tensor:
    norms = []
    for member in group.having("out"):
        weight = model.get_submodule(member.module).weight.detach()[member.offset : member.offset + group.width]
        norm_C = torch.linalg.vector_norm(weight.float().cpu().flatten(1), ord=order, dim=1)
        norms.append(_finite(norm_C, member.module, "weight"))
    return _normalised(torch.stack(norms))


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


CRITERIA: dict[str, Criterion] = {"bn_gamma": bn_gamma, "l1": l1, "l2": l2, "random": random}
