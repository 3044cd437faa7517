"""Set weights to zero: unstructured and 2:4 sparsity by magnitude, preserved during later training.

No file stores the masks: a convolution weight that is exactly 0.0 in a checkpoint stays 0.0 in every later stage. The width of
the model does not change, so only runtimes that skip zeros become faster.

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
    """Return the convolutions that become sparse: all except the first one, the outputs of the head, and DFL.

    Raises:
        RecipeError, NumericsError: See `families.check_prunable`.
    """
    excluded = set(check_prunable(model).outputs(model))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(convs))
    return {name: conv for name, conv in convs.items() if name not in excluded and name != first}


@torch.no_grad()
def unstructured(model: nn.Module, sparsity: float, scope: Scope = "local") -> dict[str, Tensor]:
    """Return masks that remove the weights with the smallest magnitudes (Han et al., arXiv 1506.02626).

    Args:
        model: Stock model. It is not changed.
        sparsity: Share of the weights to remove, in (0, 1).
        scope: `local` removes this share from each convolution. `global` ranks all weights together by w^2 divided by the sum
            over all weights of the convolution that are not smaller (LAMP, Lee et al., arXiv 2010.07611, equation 1). |w| is
            not comparable between layers, since BatchNorm cancels the scale of the weights before it.
            `benchmarks/sparsity.py` compares both scopes.

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
    """Return masks that keep the two largest of every four consecutive input channels (Mishra et al., arXiv 2104.08378).

    The choice is separate for each output channel and kernel position. This is the layout of Sparse Tensor Cores and of
    TensorRT's check ("Sparsity" in its developer guide). Convolutions whose number of input channels is not a multiple of four
    are unchanged. Of equal magnitudes the first ones stay. Channels are not permuted, unlike in NVIDIA's ASP, so fine-tuning
    has to recover more.

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
    """Set all weights that are False in the masks to exactly zero, in place."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.masked_fill_(~mask.to(weight.device), 0.0)


@torch.no_grad()
def sparsity_of(model: nn.Module) -> float:
    """Return the share of exact zeros among the weights of all convolutions."""
    weights = _conv_weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


class HoldZeros(TrainHook):
    """Hook that keeps convolution weights at zero if they are zero when training starts.

    It sets their gradients to zero before each optimizer step. SGD and Adam change a weight only by past gradients and by
    weight decay, a multiple of the weight. Both are zero, and so are the EMA and the INT8 value of the weight.
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
    """Return the weights of all convolutions except DFL, whose constant weights 0, 1, 2, ... contain a zero."""
    constants = detect.constants(model)
    convs = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return [conv.weight for name, conv in convs if name not in constants]


def _mask_of_largest(values_N: Tensor, share: float) -> Tensor:
    """Return a mask of all values except the smallest `share`. The count is exact; of equal values the first ones stay."""
    mask = torch.zeros(len(values_N), dtype=torch.bool)
    stay = len(values_N) - round(share * len(values_N))
    mask[values_N.argsort(descending=True, stable=True)[:stay]] = True
    return mask


def _lamp(magnitudes: Tensor) -> Tensor:
    """Return, flat, the energy of each weight divided by the energy of all weights that are not smaller.

    The largest weight of a layer has the score 1, so no layer loses all weights.
    """
    energy_N, order_N = magnitudes.double().square().flatten().sort(descending=True, stable=True)
    share_N = energy_N / energy_N.cumsum(0).clamp_min(torch.finfo(energy_N.dtype).tiny)
    return torch.empty_like(share_N).scatter_(0, order_N, share_N)
