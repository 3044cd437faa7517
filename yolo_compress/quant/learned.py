"""A fake quantiser whose range is trained (LSQ). It uses torch's learnable ops, since ModelOpt has LSQ only for NVFP4 weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from yolo_compress.quant.ranges import AMAX_FLOOR

LOGARITHM = "log_amax"  # name of the parameter that holds the logarithm of the range


class LearnedRange(nn.Module):
    """Fake quantiser whose range is trained: learned step size quantisation, LSQ (Esser et al., arXiv 1902.08153).

    The gradient with respect to the scale is equation 3 of the paper. As in section 2.2 of the paper, this gradient is multiplied
    by `1 / sqrt(N * high)`, where N is the number of elements per scale. Inputs outside the range get no gradient.

    The trained parameter is the logarithm of the range, as in TQT (arXiv 1903.08066). The range then stays above 0, and optimizer
    steps are relative to the range.

    Args:
        amax: Initial range, the largest absolute value that is represented: a scalar, or one value per output channel with shape
            (C, 1, 1, 1).
        num_bits: Bits of the quantised values.
        narrow_range: Use the integers from `-high` instead of from `-high - 1`.
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
        """Current range, without gradient."""
        return self.log_amax.detach().exp()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return self._quantised(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # torch's ops copy what is not contiguous
        return self._quantised(x)

    def _quantised(self, x: Tensor) -> Tensor:
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
