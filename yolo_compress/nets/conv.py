"""Functions on Ultralytics' Conv block (`conv`, `bn`, `act`): check a block, keep some of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from ultralytics.nn.modules import Conv, DWConv

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
    _check_block(name, block, (Conv,))
    check_conv2d(f"{name}.conv", block.conv)


def check_depthwise(name: str, block: nn.Module) -> None:
    """Check that a block is a stock Conv or DWConv that is depthwise: each filter reads one channel and writes it.

    Raises:
        RecipeError: The block is of another class, or is fused, quantised, wrapped or not depthwise.
    """
    _check_block(name, block, (Conv, DWConv))
    conv: Any = block.conv
    check_conv2d(f"{name}.conv", conv, conv.in_channels)
    if conv.out_channels != conv.in_channels:
        raise RecipeError(
            f"prune: {name}.conv has {conv.in_channels} inputs and {conv.out_channels} outputs, expected equal"
        )


def _check_block(name: str, block: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    if type(block) not in kinds:
        raise RecipeError(f"prune: {name} is a {type(block).__name__}, expected {kinds[-1].__name__}")
    norm = getattr(block, "bn", None)
    if norm is None:
        raise RecipeError(
            f"prune: {name} has no BatchNorm (a fused or deployed model); give the checkpoint as it was trained"
        )
    if type(norm) is not nn.BatchNorm2d or not norm.affine or not norm.track_running_stats:
        raise RecipeError(
            f"prune: {name}.bn is a {type(norm).__name__}, expected BatchNorm2d with gamma, beta and statistics"
        )


def check_conv2d(name: str, conv: nn.Module, groups: int = 1) -> None:
    """Check that a convolution is a plain Conv2d with this number of groups.

    Raises:
        RecipeError: The module is of another class, or the convolution has another number of groups.
    """
    if type(conv) is not nn.Conv2d:
        raise RecipeError(
            f"prune: {name} is a {type(conv).__name__}, expected a plain Conv2d; prune before QAT or wrapping"
        )
    if conv.groups != groups:
        raise RecipeError(f"prune: {name} is a grouped convolution (groups={conv.groups}), expected groups={groups}")


def keep_channels(module: nn.Module, out_K: Tensor | None, in_K: Tensor | None = None) -> None:
    """Keep the listed channels of a Conv2d or BatchNorm2d and remove the others, in place.

    A Conv2d has one group or is depthwise. A depthwise convolution loses input channels with its output channels.

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
            if module.groups > 1:
                module.in_channels = module.groups = module.out_channels
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


def _selected(parameter: nn.Parameter, dim: int, index_K: Tensor) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, index_K.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)
