"""Re-estimate the BatchNorm statistics of a pruned model. This recovers accuracy in a few forward passes, without training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from yolo_compress.errors import DataError, NumericsError
from yolo_compress.nets.eval_mode import evaluating


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Tensor], momentum: float | None = None) -> int:
    """Replace the BatchNorm statistics of a model, in place, by the mean and variance of activations on `batches`.

    When channels are removed, the inputs of all later layers change. The running means and variances of these layers are then
    wrong. The method is Adaptive BN of EagleEye (Li et al., arXiv 2007.02491). Training flags and momenta are restored.

    Args:
        model: float32 model on the device to use. In half precision the sums of squares overflow.
        batches: Batches `images_BCHW`, RGB, 0 to 1, letterboxed as in training. All batches have the same weight, so they
            should have the same size.
        momentum: Weight of the latest batch in a running average. If None, all batches have the same weight.

    Returns:
        The number of images that were used.

    Raises:
        DataError: There are no images.
        NumericsError: A new mean or variance is NaN or infinite.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    like = next(model.parameters())
    images_seen = 0
    try:
        with evaluating(model):
            for images_BCHW in batches:
                if images_seen == 0:  # if there is no batch, the old statistics stay
                    _start(norms.values(), momentum)
                model(images_BCHW.to(like.device, like.dtype))
                images_seen += len(images_BCHW)
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    if images_seen == 0:
        raise DataError(
            "prune: BatchNorm re-estimation has no images; raise prune.calib_images or check the training split"
        )
    for name, norm in norms.items():
        if norm.running_mean is None or not bool(torch.isfinite(norm.running_mean + norm.running_var).all()):
            raise NumericsError(
                f"prune: statistics of {name} are NaN or infinite after BatchNorm re-estimation; check the model"
            )
    return images_seen


def _start(norms: Iterable[nn.BatchNorm2d], momentum: float | None) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = momentum
        norm.train()
