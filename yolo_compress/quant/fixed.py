"""A fake quantiser with a fixed scale, in the place of ModelOpt's: no look at the device, no copy of the layout, on any device.

ModelOpt 0.47's `TensorQuantizer` makes every tensor contiguous, a copy of each one that CUDA trains channels_last. Its formula
for CUDA reads the range back to the host where its extension is not compiled, and waits for the GPU each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FixedRange(nn.Module):
    """Symmetric codes within a range that is calibrated once; gradients pass straight through.

    Args:
        amax: One number, or one an output channel, of shape (C, 1, 1, 1).
        num_bits: Of the codes.
        narrow_range: Codes from `-high` rather than `-high - 1`.
    """

    amax: Tensor

    def __init__(self, amax: Tensor, num_bits: int, narrow_range: bool) -> None:
        super().__init__()
        self.register_buffer("amax", amax.detach().clone())
        self.num_bits = num_bits
        self.is_enabled = True
        self.high = 2.0 ** (num_bits - 1) - 1
        self.low = -self.high if narrow_range else -self.high - 1

    def disable(self) -> None:
        """Let tensors pass as they are."""
        self.is_enabled = False

    def enable(self) -> None:
        """Quantise again."""
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            return x
        rounded: Tensor = _Rounding.apply(x, self.amax, self.low, self.high)
        return rounded


class _Rounding(torch.autograd.Function):
    """ModelOpt 0.47's formula, value for value, with one new tensor instead of three; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, low: float, high: float) -> Tensor:
        scale = torch.full_like(amax, high) / amax
        return (x.float() * scale).round_().clamp_(low, high).div_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None
