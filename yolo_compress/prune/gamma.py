"""Sparse training: an L1 pull on BatchNorm gammas, so that unimportant channels show themselves before pruning."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.hook import TrainHook
from yolo_compress.prune.graph import prunable

BIN_WIDTH = 0.05  # of |gamma|; trained YOLOv8 gammas lie between 0 and 4, most near 1
BINS = 81  # the last bin takes all from 4.0 up
SMALL = 1e-2  # a gamma under this scales its channel to nothing beside the usual 1


class GammaL1(TrainHook):
    """Adds the subgradient of `lambda * sum |gamma|` to the gammas of prunable channels (arXiv 1708.06519, equation 1).

    It is added once an optimizer step, after gradients are unscaled, so neither mixed precision, accumulation nor the batch size
    multiplies it. Ultralytics sums its loss over a batch: `lambda_` is measured against that sum.

    Args:
        lambda_: strength, > 0 and finite.
        ramp_epochs: the strength rises linearly from `lambda_ / ramp_epochs` in the first epoch; 0 starts with all of it.
    """

    def __init__(self, lambda_: float, ramp_epochs: float = 0) -> None:
        if not 0 < lambda_ < inf or not 0 <= ramp_epochs < inf:
            raise RecipeError(
                f"sparsify: lambda must be > 0 and ramp_epochs >= 0, both finite, got {lambda_} and {ramp_epochs}"
            )
        self.lambda_ = lambda_
        self.ramp_epochs = ramp_epochs
        self._strength = 0.0
        self._names: list[str] = []
        self._epochs: list[int] = []
        self._counts: list[list[int]] = []

    def on_model(self, model: nn.Module) -> None:
        """Finds the gammas; the histogram of epoch -1 is that of the weights before sparse training."""
        members = (member.module for group in prunable(model) for member in group.having("norm"))
        self._names = list(dict.fromkeys(members))
        self._epochs, self._counts = [-1], [self._histogram(model)]

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        self._strength = self.lambda_ * (min(1.0, (epoch + 1) / self.ramp_epochs) if self.ramp_epochs else 1.0)

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Raises RecipeError when a gamma is frozen: freezing and sparsifying the same layer contradict each other."""
        gammas = self._gammas(model)
        gradients = [gamma.grad for gamma in gammas]
        if any(gradient is None for gradient in gradients):
            frozen = next(name for name, gradient in zip(self._names, gradients, strict=True) if gradient is None)
            raise RecipeError(
                f"sparsify: gamma of {frozen} gets no gradient (frozen?); unfreeze it or leave sparsify out"
            )
        torch._foreach_add_(gradients, torch._foreach_sign(gammas), alpha=self._strength)

    @torch.no_grad()
    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Mean |gamma| and the share of gammas under `SMALL`.

        Raises:
            NumericsError: NaN or infinity; names the layer.
        """
        for name, gamma in zip(self._names, self._gammas(model), strict=True):
            if not bool(torch.isfinite(gamma).all()):
                raise NumericsError(
                    f"sparsify: gamma of {name} is NaN or infinite in epoch {epoch}; lower lambda or the rate"
                )
        magnitude = torch.cat([gamma.float().abs() for gamma in self._gammas(model)])
        self._epochs.append(epoch)
        self._counts.append(self._histogram(model))
        return {"gamma_mean": float(magnitude.mean()), "gamma_share_small": float((magnitude < SMALL).float().mean())}

    @property
    def histograms(self) -> dict[str, Any]:
        """Counts of |gamma| per epoch: `{"bin_width", "epochs": [E], "counts": [E][BINS]}`; epoch -1 is the start."""
        return {"bin_width": BIN_WIDTH, "epochs": list(self._epochs), "counts": [list(row) for row in self._counts]}

    def state_dict(self) -> dict[str, Any]:
        return {"histograms": self.histograms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        histograms = state["histograms"]
        self._epochs = list(histograms["epochs"])
        self._counts = [list(row) for row in histograms["counts"]]

    def _gammas(self, model: nn.Module) -> list[Tensor]:
        return [model.get_submodule(name).weight for name in self._names]

    @torch.no_grad()
    def _histogram(self, model: nn.Module) -> list[int]:
        magnitude = torch.cat([gamma.float().abs().cpu() for gamma in self._gammas(model)])
        bins = (magnitude / BIN_WIDTH).clamp(max=BINS - 1).long()
        return torch.bincount(bins, minlength=BINS).tolist()
