"""Weights that are exactly zero: unstructured and 2:4 sparsity by magnitude, held through any later training.

A mask is nothing but the zeros of a checkpoint: a convolution weight that is exactly 0.0 stays so in every later stage, and no
file has to say which those are. The width of the net does not change, so only a runtime that skips zeros gains from them.

Shapes: weight_OIHW, mask_OIHW (True: stays).
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
    """What is made sparse: all convolutions but the one that reads the images, the outputs of the head and DFL.

    Raises:
        RecipeError, NumericsError: see `families.check_prunable`.
    """
    kept_dense = set(check_prunable(model).outputs(model))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    first = next(iter(convs))
    return {name: conv for name, conv in convs.items() if name not in kept_dense and name != first}


@torch.no_grad()
def unstructured(model: nn.Module, sparsity: float, scope: Scope = "local") -> dict[str, Tensor]:
    """Masks that drop the smallest weights by magnitude (Han et al., arXiv 1506.02626).

    Args:
        model: stock model, not changed.
        sparsity: share of the weights that go, in (0, 1).
        scope: `local` takes the share from each convolution. `global` ranks all weights together, by w^2 over the sum of
            all no smaller ones of their convolution (LAMP, Lee et al., arXiv 2010.07611, equation 1): a BatchNorm takes
            the scale of the weights before it out again, so |w| of two layers cannot be compared
            (`benchmarks/sparsity.py` compares both scopes).

    Raises:
        RecipeError: a setting out of range.
    """
    if not 0 < sparsity < 1:
        raise RecipeError(f"prune: sparsity must lie between 0 and 1, both excluded, got {sparsity}")
    magnitudes = {name: conv.weight.detach().float().cpu().abs() for name, conv in convolutions(model).items()}
    if scope == "local":
        return {
            name: _without_smallest(values.flatten(), sparsity).view_as(values) for name, values in magnitudes.items()
        }
    if scope != "global":
        raise RecipeError(f"prune: scope of unstructured sparsity must be global or local, got {scope!r}")
    together = _without_smallest(torch.cat([_lamp(values) for values in magnitudes.values()]), sparsity)
    parts = together.split([values.numel() for values in magnitudes.values()])
    return {name: part.view_as(values) for (name, values), part in zip(magnitudes.items(), parts, strict=True)}


@torch.no_grad()
def two_four(model: nn.Module) -> dict[str, Tensor]:
    """Masks that keep the two largest of every four consecutive input channels (Mishra et al., arXiv 2104.08378).

    At each output channel and kernel position on its own, the layout of Sparse Tensor Cores and of TensorRT's check
    ("Sparsity" in its developer guide). Convolutions whose input channels are no multiple of four stay dense; of equal
    magnitudes the first stay. No channels are permuted, unlike in NVIDIA's ASP: fine-tuning has to make up for it.

    Raises:
        RecipeError: no convolution fits.
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
            "prune: no convolution has input channels that are a multiple of four; kind=two_four fits none"
        )
    return masks


@torch.no_grad()
def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks drop to exactly zero, in place."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        weight.masked_fill_(~mask.to(weight.device), 0.0)


@torch.no_grad()
def sparsity_of(model: nn.Module) -> float:
    """Share of exact zeros among the weights of all convolutions."""
    weights = _weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


class HoldZeros(TrainHook):
    """Convolution weights that are zero when training starts stay exactly zero.

    Their gradients are zeroed before each optimizer step. A step of SGD or Adam moves a weight by its gradients so far
    and by weight decay, a multiple of the weight: both are zero, so are the EMA of zeros and their 8-bit value.
    """

    def __init__(self) -> None:
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []

    def on_model(self, model: nn.Module) -> None:
        self._zeros = [(weight, mask) for weight in _weights(model) if bool((mask := weight.detach() == 0).any())]

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        for weight, mask in self._zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(mask, 0.0)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Of all convolutions but DFL, whose constant weights 0, 1, 2, ... start with a zero."""
    constants = detect.constants(model)
    convs = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return [conv.weight for name, conv in convs if name not in constants]


def _without_smallest(values_N: Tensor, share: float) -> Tensor:
    """Mask of all but the smallest `share`; exactly as many, of equal values the first stay."""
    mask = torch.zeros(len(values_N), dtype=torch.bool)
    stay = len(values_N) - round(share * len(values_N))
    mask[values_N.argsort(descending=True, stable=True)[:stay]] = True
    return mask


def _lamp(magnitudes: Tensor) -> Tensor:
    """Each weight's share in the energy of all no smaller ones, flat: 1 for the largest, so that no layer is emptied."""
    energy_N, order_N = magnitudes.double().square().flatten().sort(descending=True, stable=True)
    share_N = energy_N / energy_N.cumsum(0).clamp_min(torch.finfo(energy_N.dtype).tiny)
    return torch.empty_like(share_N).scatter_(0, order_N, share_N)
