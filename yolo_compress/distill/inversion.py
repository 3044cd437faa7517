"""Images without data: a net's BatchNorm averages say what its training images were like, so noise is bent to meet them.

DeepInversion (Yin et al., arXiv 1912.08795) without its class term: nobody says what would be where in an image.

Shapes: images_B3HW in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.nets.eval_mode import evaluating

BATCH = 16  # images whose statistics are matched together; fewer cannot be as varied as the averages ask
RATE = 0.1  # of Adam, in grey levels of 0..1: 300 steps can cross the range many times
TV_WEIGHT = 4.0  # against a misfit near 1: much less, and the images stay noise
L2_WEIGHT = 5e-3  # decides only where nothing else does
JITTER_PX = 32  # images are shifted by up to the largest stride, so that no grid of cells shows


def invert(
    teacher: nn.Module,
    count: int,
    size_hw: tuple[int, int],
    *,
    steps: int,
    seed: int,
    skip: Callable[[range], bool] = lambda numbers: False,
) -> Iterator[tuple[range, Tensor]]:
    """Images that meet the teacher's BatchNorm statistics, a batch at a time.

    A batch is a function of the teacher, its place and `seed`, so an interrupted run can leave out what it has.

    Args:
        teacher: Stock detector, unchanged; images are made where it is.
        count: Images in all.
        size_hw: Height and width in px, multiples of the largest stride.
        steps: Adam steps a batch.
        seed: Of the noise and the shifts.
        skip: Says of the numbers of a batch whether they are there already.

    Yields:
        Numbers from 0 and images_B3HW in 0..1.
    """
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    misfit = _Misfit(norms)
    needed = {parameter: parameter.requires_grad for parameter in teacher.parameters()}
    try:
        teacher.requires_grad_(False)
        with evaluating(teacher):
            for first in range(0, count, BATCH):
                numbers = range(first, min(first + BATCH, count))
                if not skip(numbers):
                    yield numbers, _batch(teacher, misfit, len(numbers), size_hw, steps, seed + first)
    finally:
        misfit.remove()
        for parameter, wanted in needed.items():
            parameter.requires_grad_(wanted)


def _batch(teacher: nn.Module, misfit: _Misfit, count: int, size_hw: tuple[int, int], steps: int, seed: int) -> Tensor:
    device = next(teacher.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    channels = next(module.in_channels for module in teacher.modules() if isinstance(module, nn.Conv2d))
    images = torch.rand(count, channels, *size_hw, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        shift = torch.randint(-JITTER_PX, JITTER_PX + 1, (2,), generator=generator).tolist()
        optimizer.zero_grad()
        teacher(images.roll(shift, dims=(2, 3)))
        loss = misfit.take() + TV_WEIGHT * total_variation(images) + L2_WEIGHT * images.square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0.0, 1.0)
    return images.detach()


def total_variation(images_B3HW: Tensor) -> Tensor:
    """Root of the mean square over locations of the differences to the neighbours below and right, all channels together."""
    down = (images_B3HW[:, :, 1:] - images_B3HW[:, :, :-1]).square().sum()
    across = (images_B3HW[..., 1:] - images_B3HW[..., :-1]).square().sum()
    locations = images_B3HW.numel() / images_B3HW.shape[1]
    return ((down + across) / locations + 1e-12).sqrt()  # the root of exactly 0 has no gradient


class _Misfit:
    """Mean over BatchNorms of how far mean and variance of their inputs are from their averages.

    Distances are relative, those of means to the standard deviations and those of variances to the variances: YOLOv8's layers
    lie orders of magnitude apart, and in the paper's plain sum a few layers decide.
    """

    def __init__(self, norms: list[nn.BatchNorm2d]) -> None:
        self._sum: Tensor | float = 0.0
        self._handles = [norm.register_forward_pre_hook(self._add) for norm in norms]

    def _add(self, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        variance_C, mean_C = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        spread_C = norm.running_var + norm.eps
        self._sum = (
            self._sum
            + (mean_C - norm.running_mean).norm() / spread_C.sqrt().norm()
            + (variance_C - norm.running_var).norm() / spread_C.norm()
        )

    def take(self) -> Tensor:
        total, self._sum = self._sum, 0.0
        assert isinstance(total, Tensor), "a net without BatchNorm has nothing to invert"
        return total / len(self._handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
