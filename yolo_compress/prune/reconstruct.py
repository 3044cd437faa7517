"""Reconstruction: adapt the weights so that the remaining channels compensate for the removed ones. No training is needed.

Channels are correlated. Let x_R be the removed and x_K the remaining input channels of a convolution. The best affine estimate of
x_R is A x_K + b with A = cov_RK cov_KK^-1. A convolution is linear. So the weight W_K + W_R A on x_K gives the output before
pruning, without the part of x_R that x_K does not determine.

This is the least-squares step of channel pruning (He et al., arXiv 1707.06168, equation 1). It solves one C x C problem per
convolution, not one per filter. It needs one pass of images through the unpruned model.

Shapes: weight_OIHW, estimate_RK.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from yolo_compress.nets.conv import norm_after
from yolo_compress.prune.calibration_stats import Moments
from yolo_compress.prune.graph import Group, check_keep

RIDGE = 1e-4  # relative to the mean variance; limits the inverse in directions that hardly vary on few images


@torch.no_grad()
def reconstruct(
    model: nn.Module, groups: Iterable[Group], keep: Mapping[str, Tensor], moments: Mapping[str, Moments]
) -> None:
    """Add the effect of input channels that will be removed to the weights of the remaining channels, in place.

    Call this function before `graph.prune`. The head of this file defines the matrix A and the constant b. The weight times b is
    added to the bias of the convolution, or subtracted from the running mean of its BatchNorm. At the border of the image, where
    the input is padding, the same A and b are used.

    Args:
        model: The unpruned model.
        groups: `graph.prunable(model)`.
        keep: Group name -> ascending indices of the channels to keep, as for `graph.prune`.
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
    for name, indices in removed.items():
        refit(modules[name], norm_after(modules, name), torch.cat(indices), moments[name])


@torch.no_grad()
def refit(conv: nn.Module, norm: nn.Module | None, removed_R: Tensor, moments: Moments) -> None:
    """Add the effect of the input channels `removed_R` of a convolution to the weights of the others, in place.

    Args:
        conv: The convolution. Its weights on the removed channels become 0.
        norm: BatchNorm after it, if any.
        removed_R: Indices of the channels.
        moments: Moments of the input of the convolution.
    """
    mask = torch.ones(conv.in_channels, dtype=torch.bool)
    mask[removed_R] = False
    kept_K = mask.nonzero().flatten()
    cov_KK, cov_KR = moments.cov_CC[kept_K][:, kept_K], moments.cov_CC[kept_K][:, removed_R]
    estimate_RK = torch.linalg.solve(add_ridge(cov_KK), cov_KR).T
    weight_OIHW = conv.weight.detach().double().cpu()
    removed_weight = weight_OIHW[:, removed_R]
    weight_OIHW[:, kept_K] += torch.einsum("orhw,rk->okhw", removed_weight, estimate_RK)
    weight_OIHW[:, removed_R] = 0.0
    conv.weight.copy_(weight_OIHW)
    constant_R = moments.mean_C[removed_R] - estimate_RK @ moments.mean_C[kept_K]
    constant_O = torch.einsum("orhw,r->o", removed_weight, constant_R)
    if conv.bias is not None:
        conv.bias.add_(constant_O.to(conv.bias))
    elif norm is not None:
        norm.running_mean.sub_(constant_O.to(norm.running_mean))


def add_ridge(cov_CC: Tensor) -> Tensor:
    """Return the covariance with `RIDGE` times the mean variance added to its diagonal, so that the matrix is invertible."""
    variance = cov_CC.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return cov_CC + RIDGE * variance * torch.eye(len(cov_CC), dtype=cov_CC.dtype)
