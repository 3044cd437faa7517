"""Set the smallest weights to zero, with unstructured or 2:4 sparsity, and keep them at zero during later training.

No file stores the masks: a convolution weight that is exactly 0.0 in a checkpoint stays 0.0 in every later stage. Layers keep
all channels, so the model is faster only on runtimes that skip zeros.

Shapes: weight_OIHW, mask_OIHW (True: the weight stays).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.families import check_prunable
from yolo_compress.train.hook import TrainHook

Scope = Literal["global", "local"]


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the convolutions that become sparse, by name.

    The first convolution, the outputs of the head, DFL, and what only training uses keep all weights.

    Raises:
        RecipeError, NumericsError: See `families.check_prunable`.
    """
    flow = check_prunable(model)
    excluded = {*flow.outputs, *flow.training}
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(convs))
    return {name: conv for name, conv in convs.items() if name not in excluded and name != first}


@torch.no_grad()
def unstructured(model: nn.Module, sparsity: float, scope: Scope = "local") -> dict[str, Tensor]:
    """Return convolution -> mask that sets the weights with the smallest magnitudes to zero (Han et al., arXiv 1506.02626).

    Args:
        model: Stock model. It is not changed.
        sparsity: Share of the weights to set to zero, in (0, 1).
        scope: `local` sets this share of each convolution's weights to zero. `global` ranks the weights of all convolutions
            together, by the LAMP score (Lee et al., arXiv 2010.07611, equation 1): w^2 divided by the sum of w^2 over all weights
            of the convolution that are not smaller. A ranking by |w| would not compare layers fairly, since a BatchNorm cancels the
            magnitude of the weights before it. `benchmarks/sparsity.py` compares both scopes.

    Raises:
        RecipeError: A setting is out of range.
    """
    if not 0 < sparsity < 1:
        raise RecipeError(f"prune: sparsity must lie between 0 and 1, both excluded, got {sparsity}")
    magnitudes = {name: conv.weight.detach().float().cpu().abs() for name, conv in convolutions(model).items()}
    if scope == "local":
        return {
            name: _mask_of_largest(values.flatten(), sparsity).view_as(values) for name, values in magnitudes.items()
        }
    if scope != "global":
        raise RecipeError(f"prune: scope of unstructured sparsity must be global or local, got {scope!r}")
    mask_N = _mask_of_largest(torch.cat([_lamp(values) for values in magnitudes.values()]), sparsity)
    parts = mask_N.split([values.numel() for values in magnitudes.values()])
    return {name: part.view_as(values) for (name, values), part in zip(magnitudes.items(), parts, strict=True)}


@torch.no_grad()
def two_four(model: nn.Module) -> dict[str, Tensor]:
    """Return convolution -> mask. Of the weights of every four consecutive input channels, the mask keeps the two largest.

    This is 2:4 sparsity (Mishra et al., arXiv 2104.08378). The choice is separate for each output channel and kernel position, as
    Sparse Tensor Cores and TensorRT require ("Sparsity" in TensorRT's developer guide). If a convolution's number of input channels
    is not a multiple of four, the convolution has no mask. Of weights with equal magnitudes the first ones stay. Channels are not
    permuted, unlike in NVIDIA's ASP, so fine-tuning has to recover more.

    Raises:
        RecipeError: No convolution has a suitable number of input channels.
    """
    masks = {}
    for name, conv in convolutions(model).items():
        out, inputs, height, width = conv.weight.shape
        if inputs % 4:
            continue
        fours = conv.weight.detach().float().cpu().abs().reshape(out, inputs // 4, 4, height, width)
        best = fours.sort(dim=2, descending=True, stable=True).indices[:, :, :2]
        masks[name] = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, best, True).reshape(conv.weight.shape)
    if not masks:
        raise RecipeError(
            "prune: no convolution has a multiple of four input channels, which kind=two_four needs; use another kind"
        )
    return masks


@torch.no_grad()
def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set all weights for which a mask is False to exactly zero, in place."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.masked_fill_(~mask.to(weight.device), 0.0)


@torch.no_grad()
def sparsity_of(model: nn.Module) -> float:
    """Return the share of weights that are exactly zero, over all convolutions of inference except DFL."""
    weights = _conv_weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


class HoldZeros(TrainHook):
    """Hook that keeps convolution weights at zero if they are zero when training starts.

    The hook sets the gradients of these weights to zero before each optimizer step. SGD and Adam change a weight only by its
    gradients and by weight decay, which is a multiple of the weight. For these weights both changes are zero. The EMA and the INT8
    value of the weight are therefore also zero.
    """

    def __init__(self) -> None:
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []

    def on_model(self, model: nn.Module) -> None:
        self._zeros = [(weight, mask) for weight in _conv_weights(model) if bool((mask := weight.detach() == 0).any())]

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        for weight, mask in self._zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(mask, 0.0)


def _conv_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all convolutions of inference except DFL, whose constant weights 0, 1, 2, ... contain a zero."""
    constants, unused = detect.constants(model), detect.only_trained(model)
    convs = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return [conv.weight for name, conv in convs if name not in constants and conv not in unused]


def _mask_of_largest(values_N: Tensor, share: float) -> Tensor:
    """Return a mask that is False for the smallest `share` of the values and True for all others.

    The number of False entries is exact. Of equal values the first ones are True.
    """
    mask = torch.zeros(len(values_N), dtype=torch.bool)
    stay = len(values_N) - round(share * len(values_N))
    mask[values_N.argsort(descending=True, stable=True)[:stay]] = True
    return mask


def _lamp(magnitudes: Tensor) -> Tensor:
    """Return the LAMP score of each weight, flattened: its square divided by the sum of squares of all weights that are not smaller.

    The largest weight of a layer has the score 1, so no layer loses all its weights.
    """
    energy_N, order_N = magnitudes.double().square().flatten().sort(descending=True, stable=True)
    share_N = energy_N / energy_N.cumsum(0).clamp_min(torch.finfo(energy_N.dtype).tiny)
    return torch.empty_like(share_N).scatter_(0, order_N, share_N)
