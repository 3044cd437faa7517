"""Factorised convolutions: a Conv block replaced by a chain of smaller Conv blocks without an activation between them.

The chain is an `nn.Sequential` of Ultralytics' own Conv blocks, so any Ultralytics loads, fuses and exports it. All but the last
block have `nn.Identity` as activation. The last one has the BatchNorm and the activation of the block that was replaced. The
children are called after the scheme and their place: `model.2.cv1.tucker0` to `model.2.cv1.tucker2`.

    mix: k x k to r channels, then 1 x 1. For k = 1, these are two 1 x 1 convolutions.
    reduce: 1 x 1 to r channels, then k x k.
    spatial: k x 1 to r channels, then 1 x k.
    tucker: 1 x 1 to r channels, k x k to s channels, then 1 x 1 (Tucker-2, arXiv 1511.06530).
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import Conv

from yolo_compress.errors import RecipeError

Scheme = Literal["mix", "reduce", "spatial", "tucker"]
_CHILD = re.compile(r"(mix|reduce|spatial|tucker)\d")
POINTWISE: tuple[Scheme, ...] = ("mix",)  # schemes for a 1 x 1 convolution, which has no kernel to split
SCHEMES: tuple[Scheme, ...] = ("mix", "reduce", "spatial", "tucker")
LAYER_ATTRIBUTES = ("i", "f", "type")  # what Ultralytics' forward reads from a layer of `model.model`


@dataclass(frozen=True)
class Factor:
    """One convolution of a chain.

    Attributes:
        weight_OIHW: its weights.
        stride, padding: (vertical, horizontal), px.
        mean_O, var_O: mean and variance of its output, from which its BatchNorm starts. The last factor has none: it takes the
            BatchNorm of the block.
    """

    weight_OIHW: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    mean_O: Tensor | None = None
    var_O: Tensor | None = None


def is_factorised(module: nn.Module) -> bool:
    """Return whether a module is a chain that `chain_of` made."""
    names = [name for name, _ in module.named_children()]
    return type(module) is nn.Sequential and bool(names) and all(_CHILD.fullmatch(name) for name in names)


def factor_names(name: str, block: nn.Module) -> list[str]:
    """Return the names of the Conv blocks that a block consists of, in order: its own name, or those of its factors."""
    return [f"{name}.{child}" for child, _ in block.named_children()] if is_factorised(block) else [name]


def is_factor(conv: str) -> bool:
    """Return whether the convolution with this name belongs to a factorised block."""
    return any(_CHILD.fullmatch(part) for part in conv.split("."))


def output_channels(block: Any) -> int:
    """Return the number of output channels of a Conv block or of a factorised one."""
    last: Any = block[-1] if isinstance(block, nn.Sequential) else block
    return int(last.conv.out_channels)


def check_whole(model: nn.Module) -> None:
    """Check that no convolution of a model is factorised.

    Raises:
        RecipeError: One is.
    """
    for name, module in model.named_modules():
        if is_factorised(module):
            raise RecipeError(
                f"prune: {name} is factorised already (prune.kind=low_rank); give the checkpoint from before, "
                "or leave the section prune out"
            )


def can_factorise(block: nn.Module) -> bool:
    """Return whether a module is a Conv block with one group, a square kernel of odd size and no dilation."""
    conv = getattr(block, "conv", None)
    if type(block) is not Conv or not isinstance(conv, nn.Conv2d):
        return False
    k = conv.kernel_size[0]
    return conv.groups == 1 and conv.dilation == (1, 1) and conv.kernel_size == (k, k) and k % 2 == 1


@torch.inference_mode(False)
@torch.no_grad()
def chain_of(block: Any, scheme: Scheme, factors: Sequence[Factor]) -> nn.Sequential:
    """Return the chain that takes the place of a Conv block. The last factor has a copy of the block's BatchNorm.

    A BatchNorm between two factors is the identity for its `mean_O` and `var_O`.

    Args:
        block: Conv block with BatchNorm.
        scheme: Scheme of the factors.
        factors: Convolutions in order.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for index, factor in enumerate(factors):
        out_channels, in_channels, height, width = factor.weight_OIHW.shape
        part = Conv(in_channels, out_channels, (height, width), factor.stride, factor.padding, act=False)
        part = part.to(block.conv.weight.device, block.conv.weight.dtype)
        part.conv.weight.copy_(factor.weight_OIHW)
        if factor.mean_O is None or factor.var_O is None:
            part.bn, part.act = copy.deepcopy(block.bn), block.act
        else:
            norm = part.bn
            norm.eps, norm.momentum = block.bn.eps, block.bn.momentum
            for tensor, value in ((norm.running_mean, factor.mean_O), (norm.running_var, factor.var_O)):
                tensor.copy_(value)
            norm.weight.copy_((factor.var_O + norm.eps).sqrt())
            norm.bias.copy_(factor.mean_O)
        parts[f"{scheme}{index}"] = part
    chain = nn.Sequential(parts).train(block.training)
    for parameter in chain.parameters():
        parameter.requires_grad_(block.conv.weight.requires_grad)
    for attribute in LAYER_ATTRIBUTES:
        if attribute in vars(block):  # `type` of a block that is no layer is a method of nn.Module
            setattr(chain, attribute, getattr(block, attribute))
    return chain


def replace_block(model: nn.Module, name: str, chain: nn.Sequential) -> None:
    """Put a chain in the place of the block `name`, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, chain)
