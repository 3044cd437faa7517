"""A fake quantiser whose range is trained with the weights, by torch's learnable ops: ModelOpt's LSQ covers NVFP4 weights only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from yolo_compress.quant.ranges import AMAX_FLOOR

LOGARITHM = "log_amax"  # the parameter's name


class LearnedRange(nn.Module):
    """Learned step size quantisation, LSQ (Esser et al., arXiv 1902.08153), in the place of a quantiser with a fixed range.

    The gradient by the step is its equation 3, and, as in its section 2.2, is scaled by `1 / sqrt(N * high)` with N the elements
    that one step serves. Outside the range no gradient reaches the input. What is trained is the logarithm of the range
    (as in TQT, arXiv 1903.08066): it stays above 0, and an optimizer's step is relative to it, whatever a tensor's magnitude is.

    Args:
        amax: Range to start from: one number, or one an output channel, of shape (C, 1, 1, 1).
        num_bits: Of the codes.
        narrow_range: Codes from `-high` rather than `-high - 1`.
    """

    is_enabled = True

    def __init__(self, amax: Tensor, num_bits: int, narrow_range: bool) -> None:
        super().__init__()
        self.log_amax = nn.Parameter(amax.detach().float().clamp_min(AMAX_FLOOR).log())
        self.num_bits = num_bits
        self.high = 2 ** (num_bits - 1) - 1
        self.low = -self.high if narrow_range else -self.high - 1

    @property
    def amax(self) -> Tensor:
        """The range as it is now, without gradient."""
        return self.log_amax.detach().exp()

    def forward(self, x: Tensor) -> Tensor:
        step = self.log_amax.flatten().exp() / self.high
        factor = 1 / math.sqrt(x.numel() / len(step) * self.high)
        zeros = torch.zeros_like(step)
        if self.log_amax.numel() == 1:
            quantised = torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), step, zeros, self.low, self.high, factor
            )
        else:
            quantised = torch._fake_quantize_learnable_per_channel_affine(
                x.float(), step, zeros, 0, self.low, self.high, factor
            )
        return quantised.to(x.dtype)
