"""Sparse training: a pull on BatchNorm gammas, so that unimportant channels show themselves before pruning."""

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

BIN_WIDTH = 0.05  # of |gamma|; trained YOLOv8 gammas lie between 0 and 4, most near 1
BINS = 81  # the last bin takes all from 4.0 up
# A gamma under this scales its channel to nothing beside the usual 1: the variance left, 1e-4, is a tenth of the eps, 1e-3,
# with which the next BatchNorm divides.
SMALL = 1e-2
CUTS_PERCENT = (25, 50, 75)  # of the channels of each group; fixed, as the budget is known to `prune` alone
LITTLE = 0.95  # of the mass under a cut of half the channels: that much left is what training without lambda leaves too
COLLAPSED, DETECTS = 0.1, 0.05  # of the mAP50-95 before; a net that had less than 0.05 has nothing to compare with


class SparseTraining(TrainHook):
    """Adds the subgradient of `lambda * penalty` to the gradients of prunable channels.

    It is added once an optimizer step, after gradients are unscaled, so neither mixed precision, accumulation nor the batch size
    multiplies it. Ultralytics sums its loss over a batch: `lambda_` is measured against that sum. A step that the gradient
    scaler skips skips the penalty too. Figures are those of the raw weights; the EMA follows them.

    Args:
        penalty: what is pulled, not yet bound to a model.
        lambda_: strength, > 0 and finite.
        ramp_epochs: the strength rises linearly from `lambda_ / ramp_epochs` in the first epoch; 0 starts with all of it.
        scale: group name -> factor of lambda there; 1 for groups that are not named.
        gamma_lr_scale: multiple of the learning rate for gammas. A step of Adam is no longer than the rate: at 0.001, hundreds
            of steps leave a gamma of 1 near 1, whatever lambda says, and the faster rate must not be that of the filters.
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
        """Finds the gammas; the histogram of epoch -1 is that of the weights before sparse training."""
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
        """Mean |gamma| and the share of gammas under `SMALL`.

        Raises:
            NumericsError: NaN, infinity, or a group whose gammas are all under `SMALL`; names the layers. The trainer
                saves after this, so the epoch before stays in `resume.pt`.
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
                    f"sparsify: gamma of {name} is NaN or infinite in epoch {epoch + 1}; {_kept(epoch)}. "
                    f"Lower sparsify.l1 (now {self.lambda_:g}) or sparsify.lr0"
                )

    def _check_alive(self, magnitudes: Mapping[str, Tensor], epoch: int) -> None:
        """A residual branch may fade beside its trunk: they are one group. A group without any gamma passes nothing on."""
        for group in self._groups:
            gammas = list(_slices(magnitudes, group))
            if gammas and all(bool((gamma_C < SMALL).all()) for gamma_C in gammas):
                layers = ", ".join(dict.fromkeys(member.module for member in group.having("norm")))
                raise NumericsError(
                    f"sparsify: every gamma of {layers} (group {group.name}) is under {SMALL:g} in epoch {epoch + 1}: "
                    f"no channel there passes anything on; {_kept(epoch)}. Lower sparsify.l1 (now {self.lambda_:g})"
                )

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


def mass_under_cut(model: nn.Module, groups: Sequence[Group], cut_percent: float) -> float:
    """Share of `sum |gamma|` in the `cut_percent` weakest channels of each group: what pruning them would take away.

    Even gammas give `cut_percent / 100`; sparse training that worked brings it near 0. A channel's mass is the sum over the
    group's BatchNorms, so the order is that of the criterion `bn_gamma`. Counts are rounded to whole channels.
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
    """`mass_under_cut` at `CUTS_PERCENT`, by percentage; JSON has no other keys than text."""
    groups = prunable(model)
    return {str(percent): mass_under_cut(model, groups, percent) for percent in CUTS_PERCENT}


def verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Both `masses` in one line, with a hint where lambda did little."""

    def row(shares: Mapping[str, float]) -> str:
        return ", ".join(f"{share:.1%}" for share in shares.values())

    text = f"gamma mass in the weakest {', '.join(before)} % of channels: before {row(before)}; after {row(after)}"
    if after["50"] > LITTLE * before["50"]:
        return f"{text}. lambda did little: raise sparsify.l1, gamma_lr_scale or epochs"
    return text


def collapsed(map50_95_before: float, map50_95_after: float) -> bool:
    """Whether a net that found objects hardly does any more."""
    return map50_95_before >= DETECTS and map50_95_after < COLLAPSED * map50_95_before


def _kept(epoch: int) -> str:
    return f"the state after epoch {epoch} is kept" if epoch else "no epoch was completed"


@torch.no_grad()
def _magnitudes(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """BatchNorm -> |gamma| of its C channels in float32 on the CPU, in order of the groups."""
    names = dict.fromkeys(member.module for group in groups for member in group.having("norm"))
    return {name: model.get_submodule(name).weight.float().abs().cpu() for name in names}


def _slices(magnitudes: Mapping[str, Tensor], group: Group) -> Iterable[Tensor]:
    """The part of each BatchNorm that belongs to the group."""
    for member in group.having("norm"):
        yield magnitudes[member.module][member.offset : member.offset + group.width]


def _histogram(magnitudes: Mapping[str, Tensor]) -> list[int]:
    bins = (torch.cat(list(magnitudes.values())) / BIN_WIDTH).clamp(max=BINS - 1).long()
    return torch.bincount(bins, minlength=BINS).tolist()
