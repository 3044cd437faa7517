"""Statistics of a model on calibration images: means and covariances of convolution inputs, and gradients of the loss.

Suffixes of tensor names are their shapes, C input and O output channels: mean_C, cov_CC, gate_C, fisher_O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from yolo_compress.errors import DataError, NumericsError
from yolo_compress.nets.eval_mode import evaluating
from yolo_compress.prune.graph import Group

NO_IMAGES = "prune: no calibration images; raise prune.calib_images or check the training split"


@dataclass(frozen=True)
class Moments:
    """Mean and covariance (float64) of the input channels of a convolution, over images and pixels."""

    mean_C: Tensor
    cov_CC: Tensor


@dataclass(frozen=True)
class Gradients:
    """Squares of the first-order changes of the loss when weights become 0, averaged over batches (float64).

    Both attributes are dictionaries by module name.

    Attributes:
        gate: BatchNorm -> (gamma dL/dgamma + beta dL/dbeta)^2 per channel. This is the squared first-order change of the loss if
            the output of the channel becomes 0.
        fisher: Conv2d -> sum of (w dL/dw)^2 over the weights of each output channel.
    """

    gate: dict[str, Tensor]
    fisher: dict[str, Tensor]


class Evidence:
    """Everything that a pruning criterion may use: the model, its channel groups, and statistics on calibration images.

    The statistics are computed when they are first used.

    Args:
        model: Stock model. It is not changed.
        groups: `graph.prunable(model)`.
        images: Function that returns batches of calibration images, `images_BCHW`, RGB 0 to 1, letterboxed.
        losses: Function that takes a model and yields its detection loss for each labelled batch, a scalar with gradient.
        seed: Seed of the criterion `random`.
        moments: `Evidence.moments`, if they are known. Else they are computed from `images`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        images: Callable[[], Iterable[Tensor]] = tuple,
        losses: Callable[[nn.Module], Iterable[Tensor]] = lambda model: (),
        seed: int = 0,
        moments: dict[str, Moments] | None = None,
    ) -> None:
        self.model = model
        self.groups = groups
        self.seed = seed
        self._images = images
        self._losses = losses
        self._known_moments = moments

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Mean and covariance of the input of every convolution that reads channels of a group, by module name.

        Raises:
            DataError: There are no images.
            NumericsError: An activation is NaN or infinite.
        """
        return self._known_moments or input_moments(self.model, self.groups, self._images())

    @cached_property
    def gradients(self) -> Gradients:
        """Squared first-order changes of the loss for every module that belongs to a channel group.

        Raises:
            DataError: There are no images.
            NumericsError: A gradient is NaN or infinite.
        """
        return loss_gradients(self.model, self.groups, self._losses(self.model))


def input_moments(model: nn.Module, groups: Iterable[Group], batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Return mean and covariance of the input of each convolution that reads channels of a group, by module name.

    The images run through the model in evaluation mode. Memory use is one C x C matrix per convolution.

    Raises:
        DataError: There are no images.
        NumericsError: An activation is NaN or infinite.
    """
    return moments_of(model, (member.module for group in groups for member in group.having("in")), batches)


@torch.no_grad()
def moments_of(
    model: nn.Module,
    convs: Iterable[str],
    batches: Iterable[Tensor],
    observe: Callable[[str, Tensor], None] = lambda conv, x_BCHW: None,
) -> dict[str, Moments]:
    """Return mean and covariance of the input of each convolution in `convs`. For the images and errors see `input_moments`.

    Args:
        model: Stock model. It is not changed.
        convs: Names of convolutions.
        batches: Calibration images.
        observe: Function that is also called with the name and the input of a convolution, for each batch.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    pixels: dict[str, int] = {}

    def record(name: str, x_BCHW: Tensor) -> None:
        observe(name, x_BCHW)
        x_CN = x_BCHW.float().transpose(0, 1).flatten(1)
        total_C, squares_CC = x_CN.sum(1).double(), (x_CN @ x_CN.T).double()
        previous = sums.get(name)
        sums[name] = (previous[0] + total_C, previous[1] + squares_CC) if previous else (total_C, squares_CC)
        pixels[name] = pixels.get(name, 0) + x_CN.shape[1]

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
        for name in dict.fromkeys(convs)
    ]
    like = next(model.parameters())
    try:
        with evaluating(model):
            for images_BCHW in batches:
                model(images_BCHW.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        raise DataError(NO_IMAGES)
    moments = {}
    for name, (total_C, squares_CC) in sums.items():
        mean_C = total_C.cpu() / pixels[name]
        # a float32 matrix product is symmetric only up to 1e-7
        squares_CC = (squares_CC + squares_CC.T).cpu() / (2 * pixels[name])
        moments[name] = Moments(mean_C, squares_CC - torch.outer(mean_C, mean_C))
        if not bool(torch.isfinite(moments[name].cov_CC).all()):
            raise NumericsError(
                f"prune: inputs of {name} are NaN or infinite on the calibration images; check the model"
            )
    return moments


def loss_gradients(model: nn.Module, groups: Iterable[Group], losses: Iterable[Tensor]) -> Gradients:
    """Back-propagate each loss separately and return the averaged squares of the first-order changes of the loss.

    The gradients and training flags of the model are restored.

    Raises:
        DataError: There are no losses.
        NumericsError: A gradient is NaN or infinite.
    """
    members = [member for group in groups for member in group.members]
    norms = dict.fromkeys(member.module for member in members if member.role == "norm")
    convs = dict.fromkeys(member.module for member in members if member.role == "out")
    gate: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    previous = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    batches = 0
    try:
        for parameter in previous:
            parameter.requires_grad_(True)
            parameter.grad = None
        for loss in losses:
            model.zero_grad(set_to_none=True)
            loss.backward()
            batches += 1
            for name in norms:
                norm = model.get_submodule(name)
                _add(gate, name, (_first_order(norm.weight) + _first_order(norm.bias)).square())
            for name in convs:
                _add(fisher, name, _first_order(model.get_submodule(name).weight).square().flatten(1).sum(1))
    finally:
        for parameter, (trainable, grad) in previous.items():
            parameter.requires_grad_(trainable)
            parameter.grad = grad
    if not batches:
        raise DataError(NO_IMAGES)
    return Gradients(*({name: total / batches for name, total in sums.items()} for sums in (gate, fisher)))


def _first_order(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return (parameter.detach() * parameter.grad).double().cpu()


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise NumericsError(
            f"prune: the gradient of {name} is NaN or infinite on the calibration images; check the model"
        )
    sums[name] = sums[name] + value if name in sums else value
