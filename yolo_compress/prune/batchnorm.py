"""BatchNorm re-estimation: the cheapest repair of a pruned network, before any training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from yolo_compress.errors import DataError, NumericsError
from yolo_compress.nets.eval_mode import evaluating


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor], momentum: float | None = None) -> int:
    """Replace the BatchNorm statistics of `model` by those of the given images, in place.

    Removing channels changes what every later layer sees; its running mean and variance are then those of another network (the
    remedy is Adaptive BN of EagleEye, Li et al., arXiv 2007.02491). Training flags and each layer's momentum come back as they were.

    Args:
        model: on its device; float32 (half sums of squares overflow).
        batches: `images_BCHW`, RGB, 0 to 1, letterboxed, as in training; best of equal size, as batches count equally.
        momentum: None averages all batches (cumulative); a number weighs the latest.

    Returns:
        The number of images seen.

    Raises:
        DataError: no image.
        NumericsError: a statistic became NaN or infinite; names the layer.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    like = next(model.parameters())
    images_seen = 0
    try:
        with evaluating(model):
            for images_BCHW in batches:
                if images_seen == 0:  # an empty iterable leaves the old statistics
                    _start(norms.values(), momentum)
                model(images_BCHW.to(like.device, like.dtype))
                images_seen += len(images_BCHW)
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    if images_seen == 0:
        raise DataError(
            "prune: BatchNorm re-estimation got no images; raise prune.calib_images or check the training split"
        )
    for name, norm in norms.items():
        if norm.running_mean is None or not bool(torch.isfinite(norm.running_mean + norm.running_var).all()):
            raise NumericsError(f"prune: statistics of {name} are NaN or infinite after BatchNorm re-estimation")
    return images_seen


def _start(norms: Iterable[nn.BatchNorm2d], momentum: float | None) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = momentum
        norm.train()
