"""Generate training images from a model: optimise noise until its activations have the model's BatchNorm statistics.

No data set is needed. This is DeepInversion (Yin et al., arXiv 1912.08795) without the class term of the paper, since the images
have no labels.

Shapes: images_B3HW is a (B, 3, H, W) RGB tensor in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.nets.eval_mode import evaluating

BATCH = 16  # images that are optimised together; the statistics of fewer images cannot match the averages
RATE = 0.1  # learning rate of Adam, for values of 0..1: 300 steps can change a value by much more than 1
TV_WEIGHT = 4.0  # relative to a misfit near 1; with much smaller weights the images stay noise
L2_WEIGHT = 5e-3  # small, so this term only has an effect where the other terms have none
JITTER_PX = 32  # images are shifted by up to the largest stride, which prevents a visible grid of cells


def invert(
    teacher: nn.Module,
    count: int,
    size_hw: tuple[int, int],
    *,
    steps: int,
    seed: int,
    skip: Callable[[range], bool] = lambda numbers: False,
) -> Iterator[tuple[range, Tensor]]:
    """Yield generated images on which the teacher's activations have its BatchNorm statistics, one batch at a time.

    The images of a batch depend only on the teacher, the arguments and the number of the batch. An interrupted run can therefore
    skip finished batches.

    Args:
        teacher: Stock detector. It is not changed; images are generated on its device.
        count: Total number of images.
        size_hw: Height and width in px, multiples of the largest stride.
        steps: Number of Adam steps per batch.
        seed: Seed of the initial noise and of the random shifts.
        skip: Function that takes the image numbers of a batch and returns True if the batch already exists.

    Yields:
        (image numbers, counted from 0; images_B3HW in 0..1) for each batch that is not skipped.
    """
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    misfit = _Misfit(norms)
    trainable = {parameter: parameter.requires_grad for parameter in teacher.parameters()}
    try:
        teacher.requires_grad_(False)
        with evaluating(teacher):
            for first in range(0, count, BATCH):
                numbers = range(first, min(first + BATCH, count))
                if not skip(numbers):
                    yield numbers, _batch(teacher, misfit, len(numbers), size_hw, steps, seed + first)
    finally:
        misfit.remove()
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)


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
    """Return the root mean square of the differences between each pixel and its neighbours below and to the right.

    Squares are summed over channels and averaged over locations.
    """
    down = (images_B3HW[:, :, 1:] - images_B3HW[:, :, :-1]).square().sum()
    across = (images_B3HW[..., 1:] - images_B3HW[..., :-1]).square().sum()
    locations = images_B3HW.numel() / images_B3HW.shape[1]
    return ((down + across) / locations + 1e-12).sqrt()  # the root has no finite gradient at 0


class _Misfit:
    """Measures how far the mean and variance of BatchNorm inputs are from the running statistics, averaged over all BatchNorms.

    Differences of means are divided by the standard deviation, and differences of variances by the variance. The values of YOLOv8's
    layers differ by orders of magnitude, so with the absolute differences of the paper a few layers would dominate.
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
        assert isinstance(total, Tensor), "the model has no BatchNorm"
        return total / len(self._handles)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
