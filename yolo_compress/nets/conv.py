"""Functions on Ultralytics' Conv block (`conv`, `bn`, `act`): check a block, keep some of its channels, join two blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Conv

from yolo_compress.errors import RecipeError


def norm_after(modules: Mapping[str, nn.Module], conv: str) -> nn.Module | None:
    """Return the BatchNorm that follows the convolution named `conv`, or None if the block has no BatchNorm or it was fused.

    Args:
        modules: Module name -> module, for all modules of the model.
        conv: Name of the convolution.
    """
    return modules.get(f"{conv.removesuffix('conv')}bn") if conv.endswith("conv") else None


def check_conv(name: str, block: nn.Module) -> None:
    """Check that a block is a stock Conv whose channels can be selected.

    Raises:
        RecipeError: The block is of another class, or is fused, quantised, wrapped or grouped.
    """
    if type(block) is not Conv:
        raise RecipeError(f"prune: {name} is a {type(block).__name__}, expected Conv")
    norm = getattr(block, "bn", None)
    if norm is None:
        raise RecipeError(
            f"prune: {name} has no BatchNorm (a fused or deployed model); give the checkpoint as it was trained"
        )
    if type(norm) is not nn.BatchNorm2d or not norm.affine or not norm.track_running_stats:
        raise RecipeError(
            f"prune: {name}.bn is a {type(norm).__name__}, expected BatchNorm2d with gamma, beta and statistics"
        )
    check_conv2d(f"{name}.conv", block.conv)


def check_conv2d(name: str, conv: nn.Module) -> None:
    """Check that a convolution is a plain Conv2d without groups.

    Raises:
        RecipeError: The module is of another class, or the convolution has groups.
    """
    if type(conv) is not nn.Conv2d:
        raise RecipeError(
            f"prune: {name} is a {type(conv).__name__}, expected a plain Conv2d; prune before QAT or wrapping"
        )
    if conv.groups != 1:
        raise RecipeError(f"prune: {name} is a grouped convolution (groups={conv.groups}), expected groups=1")


def keep_channels(module: nn.Module, out_K: Tensor | None, in_K: Tensor | None = None) -> None:
    """Keep the listed channels of a Conv2d (groups=1) or BatchNorm2d and remove the others, in place.

    The module gets new parameter objects without gradients.

    Args:
        module: The Conv2d or BatchNorm2d to change.
        out_K: Indices of the output channels to keep; None keeps all.
        in_K: Indices of the input channels to keep; None keeps all. Ignored for a BatchNorm2d.
    """
    if isinstance(module, nn.Conv2d):
        if out_K is not None:
            module.weight = _selected(module.weight, 0, out_K)
            if module.bias is not None:
                module.bias = _selected(module.bias, 0, out_K)
            module.out_channels = module.weight.shape[0]
        if in_K is not None:
            module.weight = _selected(module.weight, 1, in_K)
            module.in_channels = module.weight.shape[1]
    elif isinstance(module, nn.BatchNorm2d):
        if out_K is not None:
            module.weight, module.bias = _selected(module.weight, 0, out_K), _selected(module.bias, 0, out_K)
            index = out_K.to(module.weight.device)
            module.running_mean = module.running_mean.index_select(0, index)
            module.running_var = module.running_var.index_select(0, index)
            module.num_features = module.weight.shape[0]
    else:
        raise TypeError(f"expected Conv2d or BatchNorm2d, got {type(module).__name__}")


def copy_with_outputs(conv: Conv, index_K: Tensor) -> Conv:
    """Return a copy of a Conv block that has only the listed output channels.

    BatchNorm settings, flags and dtype do not change. The copy and the original share one activation module. Stock models
    also have one activation module for all blocks (`Conv.default_act`), and the activation has no parameters.
    """
    part = copy.deepcopy(conv, {id(conv.act): conv.act})
    keep_channels(part.conv, index_K)
    keep_channels(part.bn, index_K)
    return part


def concatenate_outputs(first: Conv, second: Conv) -> Conv:
    """Return one Conv block that outputs the channels of `first`, then those of `second`. Both must read the same input."""
    merged = copy.deepcopy(first, {id(first.act): first.act})
    merged.conv.weight = _concatenated(first.conv.weight, second.conv.weight)
    merged.conv.out_channels = merged.bn.num_features = first.conv.out_channels + second.conv.out_channels
    merged.bn.weight = _concatenated(first.bn.weight, second.bn.weight)
    merged.bn.bias = _concatenated(first.bn.bias, second.bn.bias)
    merged.bn.running_mean = torch.cat([first.bn.running_mean, second.bn.running_mean])
    merged.bn.running_var = torch.cat([first.bn.running_var, second.bn.running_var])
    return merged


def _selected(parameter: nn.Parameter, dim: int, index_K: Tensor) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, index_K.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def _concatenated(first: nn.Parameter, second: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.cat([first.detach(), second.detach()]), requires_grad=first.requires_grad)
