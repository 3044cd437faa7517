"""Copy a model to torch's meta device. A forward pass there yields shapes and an autograd graph but computes no values."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def shadow(model: nn.Module) -> nn.Module:
    """Return a float32 copy of `model` on the meta device: in evaluation mode, all parameters trainable, without hooks."""
    memo = {id(tensor): _weightless(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()  # deepcopy copies taps and observers too; they must not see meta tensors
        module._forward_pre_hooks.clear()
        if "shape" in vars(module):
            module.shape = None  # makes Detect compute its anchors again: the copied ones are real tensors
    return twin.eval()


def blank_images(model: nn.Module, imgsz_hw: tuple[int, int]) -> Tensor:
    """Return one image without values on the meta device, shape (1, C, H, W).

    C is the number of input channels of the model's first convolution.
    """
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return torch.empty(1, channels, *imgsz_hw, device="meta")


def _weightless(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    twin = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin
