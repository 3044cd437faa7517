"""Sparse training: a penalty on BatchNorm gammas that weakens unimportant channels before pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.graph import Group, prunable
from yolo_compress.prune.penalty import Penalty
from yolo_compress.train.hook import TrainHook

BIN_WIDTH = 0.05  # width of a histogram bin of |gamma|; trained YOLOv8 gammas lie between 0 and 4, most near 1
BINS = 81  # the last bin counts all values from 4.0 on
# A channel with a smaller |gamma| has almost no effect: its variance, 1e-4, is a tenth of the eps of the next BatchNorm, 1e-3.
SMALL = 1e-2
CUTS_PERCENT = (25, 50, 75)  # share of the channels of each group, in %; fixed, since only `prune` knows the budget
# Training without lambda reaches this ratio: gamma mass of the weaker half of the channels, after training divided by before.
LITTLE = 0.95
COLLAPSED = 0.1  # a model has collapsed if its mAP50-95 falls below this share of its mAP50-95 before sparse training
DETECTS = 0.05  # mAP50-95 before training below which collapse is not checked


class SparseTraining(TrainHook):
    """Hook that adds the subgradient of `lambda * penalty` to the gradients of prunable channels.

    The subgradient is added once per optimizer step, after the gradients are unscaled. Mixed precision, accumulation and batch size
    therefore do not multiply the penalty. Ultralytics sums its loss over a batch, so `lambda_` is relative to that sum. If the
    gradient scaler skips a step, it also skips the penalty. Logged values belong to the trained weights, not to the EMA.

    Args:
        penalty: Penalty that is not yet bound to a model.
        lambda_: Strength, > 0 and finite.
        ramp_epochs: Number of epochs over which the strength rises linearly, from `lambda_ / ramp_epochs` in the first epoch.
            If 0, the strength is constant.
        scale: Group name -> factor of lambda. Groups that are not in `scale` have the factor 1.
        gamma_lr_scale: Factor of the learning rate for gammas; filters keep the normal rate. A step of Adam is at most the
            learning rate. With a rate of 0.001, a gamma of 1 is still near 1 after hundreds of steps, whatever lambda is.
    """

    def __init__(
        self,
        penalty: Penalty,
        lambda_: float,
        ramp_epochs: float = 0,
        scale: Mapping[str, float] | None = None,
        gamma_lr_scale: float = 1.0,
    ) -> None:
        if not 0 < lambda_ < inf or not 0 <= ramp_epochs < inf:
            raise RecipeError(
                f"sparsify: lambda must be > 0 and ramp_epochs >= 0, both finite, got {lambda_} and {ramp_epochs}"
            )
        self.penalty = penalty
        self.lambda_ = lambda_
        self.ramp_epochs = ramp_epochs
        self.scale = scale or {}
        self.gamma_lr_scale = gamma_lr_scale
        self._strength = 0.0
        self._groups: list[Group] = []
        self._epochs: list[int] = []
        self._counts: list[list[int]] = []

    def on_model(self, model: nn.Module) -> None:
        """Find the gammas and record the histogram before sparse training as epoch -1."""
        self._groups = prunable(model)
        self.penalty.bind(model, self._groups, self.scale)
        self._epochs, self._counts = [-1], [_histogram(_magnitudes(model, self._groups))]

    def rates(self, model: nn.Module) -> dict[str, float]:
        names = dict.fromkeys(member.module for group in self._groups for member in group.having("norm"))
        return {f"{name}.weight": self.gamma_lr_scale for name in names}

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        self._strength = self.lambda_ * (min(1.0, (epoch + 1) / self.ramp_epochs) if self.ramp_epochs else 1.0)

    def before_step(self, model: nn.Module) -> None:
        self.penalty.add_subgradient(model, self._strength)

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Return the values to log after an epoch: the mean |gamma| and the share of gammas below `SMALL`.

        Raises:
            NumericsError: A gamma is NaN or infinite, or all gammas of a group are below `SMALL`. The trainer saves after this
                call, so `resume.pt` still contains the previous epoch.
        """
        magnitudes = _magnitudes(model, self._groups)
        self._check_finite(magnitudes, epoch)
        self._check_alive(magnitudes, epoch)
        self._epochs.append(epoch)
        self._counts.append(_histogram(magnitudes))
        every = torch.cat(list(magnitudes.values()))
        return {"gamma_mean": float(every.mean()), "gamma_share_small": float((every < SMALL).float().mean())}

    def _check_finite(self, magnitudes: Mapping[str, Tensor], epoch: int) -> None:
        for name, magnitude_C in magnitudes.items():
            if not bool(torch.isfinite(magnitude_C).all()):
                raise NumericsError(
                    f"sparsify: gamma of {name} is NaN or infinite in epoch {epoch + 1}; {_resume_note(epoch)}. "
                    f"Lower sparsify.l1 (now {self.lambda_:g}) or sparsify.lr0"
                )

    def _check_alive(self, magnitudes: Mapping[str, Tensor], epoch: int) -> None:
        """Check that every channel group has at least one gamma of `SMALL` or more.

        The gammas of a residual branch may all be small, since the branch and its trunk belong to the same group.
        """
        for group in self._groups:
            gammas = list(_slices(magnitudes, group))
            if gammas and all(bool((gamma_C < SMALL).all()) for gamma_C in gammas):
                layers = ", ".join(dict.fromkeys(member.module for member in group.having("norm")))
                raise NumericsError(
                    f"sparsify: every gamma of {layers} (group {group.name}) is under {SMALL:g} in epoch {epoch + 1}, so "
                    f"these layers have no effect; {_resume_note(epoch)}. Lower sparsify.l1 (now {self.lambda_:g})"
                )

    @property
    def histograms(self) -> dict[str, Any]:
        """Histograms of |gamma| as `{"bin_width", "epochs": [E], "counts": [E][BINS]}`. Epoch -1 is before training."""
        return {"bin_width": BIN_WIDTH, "epochs": list(self._epochs), "counts": [list(row) for row in self._counts]}

    def state_dict(self) -> dict[str, Any]:
        return {"histograms": self.histograms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        histograms = state["histograms"]
        self._epochs = list(histograms["epochs"])
        self._counts = [list(row) for row in histograms["counts"]]


def mass_under_cut(model: nn.Module, groups: Sequence[Group], cut_percent: float) -> float:
    """Return how much of `sum |gamma|` belongs to the weakest `cut_percent` % of the channels of each group, as a fraction.

    If all gammas are equal, the result is `cut_percent / 100`. After a successful sparse training, the result is near 0. Channels
    are ranked by the sum of their |gamma| over the BatchNorms of the group, as in the criterion `bn_gamma`. Channel counts are
    rounded.
    """
    magnitudes = _magnitudes(model, groups)
    cut = total = 0.0
    for group in groups:
        mass_C = sum(_slices(magnitudes, group), torch.zeros(group.width)).double()
        weakest = mass_C.sort().values[: round(cut_percent / 100 * group.width)]
        cut += float(weakest.sum())
        total += float(mass_C.sum())
    return cut / total if total else 0.0


def masses(model: nn.Module) -> dict[str, float]:
    """Return percentage -> `mass_under_cut`, for each percentage in `CUTS_PERCENT`. Keys are strings, as JSON requires."""
    groups = prunable(model)
    return {str(percent): mass_under_cut(model, groups, percent) for percent in CUTS_PERCENT}


def verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Return one line of text with the `masses` before and after sparse training, and a hint if lambda had little effect."""

    def row(shares: Mapping[str, float]) -> str:
        return ", ".join(f"{share:.1%}" for share in shares.values())

    text = f"gamma mass in the weakest {', '.join(before)} % of channels: before {row(before)}; after {row(after)}"
    if after["50"] > LITTLE * before["50"]:
        return f"{text}. lambda had little effect: raise sparsify.l1, gamma_lr_scale or epochs"
    return text


def collapsed(map50_95_before: float, map50_95_after: float) -> bool:
    """Return whether a model that detected objects before training has lost most of its mAP50-95."""
    return map50_95_before >= DETECTS and map50_95_after < COLLAPSED * map50_95_before


def _resume_note(epoch: int) -> str:
    return f"the state after epoch {epoch} is kept" if epoch else "no epoch was completed"


@torch.no_grad()
def _magnitudes(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Return BatchNorm -> |gamma| in float32 on the CPU, in the order of the groups."""
    names = dict.fromkeys(member.module for group in groups for member in group.having("norm"))
    return {name: model.get_submodule(name).weight.float().abs().cpu() for name in names}


def _slices(magnitudes: Mapping[str, Tensor], group: Group) -> Iterable[Tensor]:
    """Yield, for each BatchNorm of the group, the |gamma| of the channels that belong to the group."""
    for member in group.having("norm"):
        yield magnitudes[member.module][member.offset : member.offset + group.width]


def _histogram(magnitudes: Mapping[str, Tensor]) -> list[int]:
    bins = (torch.cat(list(magnitudes.values())) / BIN_WIDTH).clamp(max=BINS - 1).long()
    return torch.bincount(bins, minlength=BINS).tolist()
