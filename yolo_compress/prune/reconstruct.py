"""Reconstruction: what the removed channels said is taken over by those that stay, before any training.

Channels are correlated. With x_R the removed and x_K the kept input channels of a convolution, the best affine guess of x_R is
A x_K + b, A = cov_RK cov_KK^-1. A convolution is linear in its input, so the weight W_K + W_R A computes from x_K what the dense
one computed from both, up to the part of x_R that x_K cannot tell. It is the least-squares step of channel pruning (He et al.,
arXiv 1707.06168, equation 1) with one C x C problem a convolution instead of one a filter, from a single pass of the dense net.

Shapes: weight_OIHW, guess_RK.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from yolo_compress.nets.conv import norm_after
from yolo_compress.prune.calibration_stats import Moments
from yolo_compress.prune.graph import Group, check_keep

RIDGE = 1e-4  # of the mean variance: directions that hardly vary on few images must not blow up the inverse


@torch.no_grad()
def reconstruct(
    model: nn.Module, groups: Iterable[Group], keep: Mapping[str, Tensor], moments: Mapping[str, Moments]
) -> None:
    """Move the weights that read removed channels onto those that read kept ones, in place; call it before `graph.prune`.

    The constant b goes into the bias of convolutions that have one, elsewhere off the running mean of their BatchNorm. At
    the border, where padding is no image, A and b are the guess of the inside.

    Args:
        model: The dense model that the moments are of.
        groups: `graph.prunable(model)`.
        keep: Group name -> ascending indices of the channels kept, as for `graph.prune`.
        moments: `calibration_stats.input_moments` of `model`.

    Raises:
        RecipeError: See `graph.check_keep`.
    """
    groups = list(groups)
    check_keep(groups, keep)
    modules = dict(model.named_modules())
    removed: dict[str, list[Tensor]] = {}
    for group in groups:
        if group.name not in keep or len(keep[group.name]) == group.width:
            continue
        mask = torch.ones(group.width, dtype=torch.bool)
        mask[keep[group.name].cpu()] = False
        for member in group.having("in"):
            removed.setdefault(member.module, []).append(mask.nonzero().flatten() + member.offset)
    for name, parts in removed.items():
        _reconstruct(modules[name], norm_after(modules, name), torch.cat(parts), moments[name])


def _reconstruct(conv: nn.Module, norm: nn.Module | None, gone_R: Tensor, own: Moments) -> None:
    mask = torch.ones(conv.in_channels, dtype=torch.bool)
    mask[gone_R] = False
    kept_K = mask.nonzero().flatten()
    cov_KK, cov_KR = own.cov_CC[kept_K][:, kept_K], own.cov_CC[kept_K][:, gone_R]
    guess_RK = torch.linalg.solve(ridged(cov_KK), cov_KR).T
    weight_OIHW = conv.weight.detach().double().cpu()
    gone_weight = weight_OIHW[:, gone_R]
    weight_OIHW[:, kept_K] += torch.einsum("orhw,rk->okhw", gone_weight, guess_RK)
    weight_OIHW[:, gone_R] = 0.0
    conv.weight.copy_(weight_OIHW)
    constant_R = own.mean_C[gone_R] - guess_RK @ own.mean_C[kept_K]
    constant_O = torch.einsum("orhw,r->o", gone_weight, constant_R)
    if conv.bias is not None:
        conv.bias.add_(constant_O.to(conv.bias))
    elif norm is not None:
        norm.running_mean.sub_(constant_O.to(norm.running_mean))


def ridged(cov_CC: Tensor) -> Tensor:
    """The covariance with `RIDGE` of its mean variance (of 1, where nothing varies) on the diagonal: invertible."""
    variance = cov_CC.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return cov_CC + RIDGE * variance * torch.eye(len(cov_CC), dtype=cov_CC.dtype)
