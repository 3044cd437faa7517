"""A copy of a model on torch's meta device: shapes and autograd graph of a forward pass without weights, memory or time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def shadow(model: nn.Module) -> nn.Module:
    """A float32 copy of `model` on the meta device, in evaluation mode, every parameter trainable, without hooks."""
    memo = {id(tensor): _weightless(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()  # taps and observers were copied too and must not see meta tensors
        module._forward_pre_hooks.clear()
        if "shape" in vars(module):
            module.shape = None  # Detect keeps anchors of the last image size; those of the copy are real tensors
    return twin.eval()


def blank_images(model: nn.Module, imgsz_hw: tuple[int, int]) -> Tensor:
    """One meta image of the channel count that the model's first convolution takes: `image_1CHW`."""
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return torch.empty(1, channels, *imgsz_hw, device="meta")


def _weightless(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    twin = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin
