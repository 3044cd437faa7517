"""A fake quantiser with a fixed scale. It replaces the fake quantiser of ModelOpt, which is slow on a GPU.

ModelOpt 0.47's `TensorQuantizer` makes every tensor contiguous. On CUDA, models train in the channels_last layout, so each tensor
is copied. Without its compiled CUDA extension, ModelOpt also copies the range to the host, and each such copy waits for the GPU.
The quantiser in this file makes no such copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FixedRange(nn.Module):
    """Fake quantiser that rounds to symmetric integers within a fixed range. Gradients are straight-through.

    Args:
        amax: Range, the largest absolute value that is represented: a scalar, or one value per output channel with shape
            (C, 1, 1, 1).
        num_bits: Bits of the quantised values.
        narrow_range: Use the integers from `-high` instead of from `-high - 1`.
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
        """Stop quantising: `forward` then returns its input unchanged."""
        self.is_enabled = False

    def enable(self) -> None:
        """Quantise again after `disable`."""
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            return x
        rounded: Tensor = _Rounding.apply(x, self.amax, self.low, self.high)
        return rounded


class _Rounding(torch.autograd.Function):
    """Round to the quantised values, with straight-through gradients.

    The results equal ModelOpt 0.47 exactly, but one new tensor is allocated instead of three.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, low: float, high: float) -> Tensor:
        scale = torch.full_like(amax, high) / amax
        return (x.float() * scale).round_().clamp_(low, high).div_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None
