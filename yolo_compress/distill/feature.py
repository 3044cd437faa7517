"""Feature losses: distances between feature maps of student and teacher, and adapters that make the maps comparable.

A distance is a pure function `distance(student_BCHW, teacher_BCHW, weight_B1HW)`. It returns a scalar with a gradient to the
student only. `weight_B1HW` is the teacher's best class score at each location; most distances ignore it. The student's map first
passes an adapter, which is trained with the student and removed after training. A `FeatureLoss` has a distance and an adapter.
`choices.FEATURE_LOSSES` lists the feature losses.

Shapes: feat_BCHW, weight_B1HW; Q are the H x W locations, flattened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolo_compress import ranks
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import choices

KNOB = "distill.feature_loss"
EPSILON = 1e-9  # prevents division by 0 if all teacher scores are 0
FLAT = 1e-6  # below the standard deviation of any map that is not constant, above the rounding error of a constant map
MOMENT_BYTES = 256 << 20  # largest float64 tensor in `Aligner.start`; all of batch 32 at 640 px would take 1.4 GiB
MASKED = 0.65  # share of masked locations, as in MGD for one-stage detectors (arXiv 2205.01529)


def l2(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Return the mean squared difference of two feature maps: FitNets' hint loss (arXiv 1412.6550, equation 3), as a mean.

    Returns:
        Scalar, 0 for equal maps.
    """
    return F.mse_loss(student_BCHW, teacher_BCHW)


def weighted_l2(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Return the mean squared difference of two feature maps, weighted at each location by the teacher's best class score.

    This is FitNets' hint loss (arXiv 1412.6550) with the weighting of Ultralytics' own distillation (`loss_sl2`, 8.4). If all
    locations have the same weight, the background dominates, since it covers most of the map.

    Returns:
        Scalar, 0 for equal maps.
    """
    squared = (student_BCHW - teacher_BCHW).square() * weight_B1HW
    return squared.sum() / (weight_B1HW.sum() * student_BCHW.shape[1] + EPSILON)


def channel_wise(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Return the channel-wise distillation loss, CWD (arXiv 2011.13256), which compares where each channel is active.

    The softmax over all H x W locations turns a channel into a distribution. The loss is the KL divergence between the teacher's
    and the student's distribution, averaged over channels and images. The temperature is 1, as in MMRazor for detectors. A
    constant that is added to a channel does not change the loss.

    Returns:
        Scalar, 0 for equal maps.
    """
    student_BCQ, teacher_BCQ = (F.log_softmax(feat.flatten(2), dim=2) for feat in (student_BCHW, teacher_BCHW))
    divergence = F.kl_div(student_BCQ, teacher_BCQ, reduction="sum", log_target=True)
    return divergence / (student_BCHW.shape[0] * student_BCHW.shape[1])


def pearson(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Return one minus the Pearson correlation between student and teacher, averaged over channels: PKD (arXiv 2207.02039).

    The correlation of a channel is computed over all images and locations. The paper states the same number as half the mean
    squared difference of the standardised maps. A positive factor or an offset of a channel does not change the loss, so teacher
    and student may have different magnitudes.

    Returns:
        Scalar in 0..2, 0 for equal maps.
    """
    student_BCHW, teacher_BCHW = _standardised(student_BCHW), _standardised(teacher_BCHW)
    return F.mse_loss(student_BCHW, teacher_BCHW) / 2


def _standardised(feat_BCHW: Tensor) -> Tensor:
    centred = feat_BCHW - feat_BCHW.mean(dim=(0, 2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True).sqrt() + FLAT)


def attention(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Return the squared distance between the attention maps of student and teacher, averaged over images.

    An attention map is the sum of squares over channels, normalised over locations (arXiv 1612.03928, equation 2). The squared
    distance is 2 - 2 cos. The distance is squared because the norm in the paper has no gradient at 0. Student and teacher may have
    different numbers of channels, and the order of channels has no effect.

    Returns:
        Scalar in 0..2, 0 for equal maps.
    """
    student_BQ, teacher_BQ = (
        F.normalize(feat.square().sum(dim=1).flatten(1), dim=1) for feat in (student_BCHW, teacher_BCHW)
    )
    return (student_BQ - teacher_BQ).square().sum(dim=1).mean()


def relation(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Return the mean squared difference between the image similarities of student and teacher.

    A similarity compares the feature maps of two images of the batch. All similarities of a model are a Gram matrix with normalised
    rows (arXiv 1907.09682, equations 1 to 4). Student and teacher may have different numbers of channels. For a batch of one image
    the loss is 0.

    Returns:
        Scalar, 0 for equal maps.
    """
    student_BB, teacher_BB = (F.normalize(_gram(feat), dim=1) for feat in (student_BCHW, teacher_BCHW))
    return F.mse_loss(student_BB, teacher_BB)


def _gram(feat_BCHW: Tensor) -> Tensor:
    rows = feat_BCHW.flatten(1)
    return rows @ rows.T


class Aligner(nn.Conv2d):
    """A trained 1x1 convolution that maps the student's feature map to the teacher's number of channels.

    The weights start as the identity, so the loss of equal models is 0. `start` then sets the weights to the ridge regression of
    the teacher's map on the student's. This is necessary because channel i of a pruned model is not channel i of the unpruned
    model. The distance to the teacher's maps was measured for YOLOv8n pruned to half of its MACs (`benchmarks/distillation.py
    aligners`). Relative to the variance of the maps, the squared distance is 2 to 6 with the identity, and 0.2 to 0.5 with the
    regression.
    """

    started: Tensor  # a buffer, so that a resumed run does not call `start` again

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> None:
        """Set the weights by ridge regression of the teacher's map on the student's, for the first batch. Later calls do nothing.

        The regression of the residual is added to the identity. If both maps are equal, the weights therefore stay the identity.
        With several ranks, the moments are summed over all of them, so that all have equal weights.
        """
        if bool(self.started):
            return
        row_bytes = 8 * (2 * student_BCHW.shape[1] + 3 * teacher_BCHW.shape[1] + 2)
        images = max(1, MOMENT_BYTES // (row_bytes * student_BCHW[0, 0].numel()))
        moments = sum(map(self._moments, student_BCHW.split(images), teacher_BCHW.split(images)))
        if ranks.several():
            torch.distributed.all_reduce(moments)
        assert isinstance(moments, Tensor)
        width, n = student_BCHW.shape[1], moments[-1, -1]
        moments = moments / n
        mean_C, mean_D = moments[-1, :width], moments[-1, width:-1]
        covariance_CC = moments[:-1, :width] - torch.outer(mean_C, mean_C)
        cross_CD = moments[:-1, width:-1] - torch.outer(mean_C, mean_D)
        # The ridge is stronger if there are few locations per channel. On BCCD no smaller lambda was better on unseen images.
        ridge = width / n * covariance_CC.diagonal().mean().clamp(min=EPSILON)
        regression_CD = torch.linalg.solve(covariance_CC + ridge * torch.eye(width).to(covariance_CC), cross_CD)
        self.weight += regression_CD.T.to(self.weight).view_as(self.weight)
        self.bias += (mean_D - mean_C @ regression_CD).to(self.weight)  # type: ignore[operator]
        self.started.fill_(True)

    def _moments(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Return the sums over all locations of (student, 1) times (student, residual of the teacher, 1), in float64."""
        student_NC = student_BCHW.detach().movedim(1, 3).flatten(0, 2).double()
        residual_ND = teacher_BCHW.detach().movedim(1, 3).flatten(0, 2).double()
        residual_ND = residual_ND - (student_NC @ self.weight.double().flatten(1).T + self.bias.double())  # type: ignore[union-attr]
        ones_N1 = student_NC.new_ones(len(student_NC), 1)
        return torch.cat([student_NC, ones_N1], dim=1).T @ torch.cat([student_NC, residual_ND, ones_N1], dim=1)


class Generator(nn.Module):
    """Generator of MGD (arXiv 2205.01529): reconstructs the teacher's map from a randomly masked map of the student.

    Each location of the student's map therefore has to contain information about its neighbours. The loss is not 0 even for equal
    maps, since a third of a map does not determine the rest. The mask comes from torch's global random generator, which the trainer
    seeds in each epoch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, feat_BCHW: Tensor) -> Tensor:
        visible_B1HW = torch.rand_like(feat_BCHW[:, :1]) >= MASKED
        return self.second(F.relu(self.first(feat_BCHW * visible_B1HW)))  # type: ignore[no-any-return]


def _aligner_and_generator(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Sequential(Aligner(student_channels, teacher_channels), Generator(teacher_channels))


def _no_adapter(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Identity()


class FeatureLoss(NamedTuple):
    """A distance between two feature maps, and a function that makes the adapter for the student's map.

    Attributes:
        distance: (student_BCHW, teacher_BCHW, weight_B1HW) -> scalar.
        adapter: (student's number of channels, teacher's number of channels) -> module that the student's map passes first.
    """

    distance: Callable[[Tensor, Tensor, Tensor], Tensor]
    adapter: Callable[[int, int], nn.Module] = Aligner


MGD = FeatureLoss(l2, _aligner_and_generator)
ATTENTION = FeatureLoss(attention, _no_adapter)
RELATION = FeatureLoss(relation, _no_adapter)


def find(name: str) -> FeatureLoss:
    """Return the feature loss called `name`: a name in `choices.FEATURE_LOSSES`, or `file.py:function` for a user's own loss.

    If the user's object is a function, the function is the distance and the adapter is an `Aligner`. If the object is a
    `FeatureLoss`, that object has its own adapter. A user's loss is tested on small maps.

    Raises:
        RecipeError: There is no such name, file or function. Or the function does not take `(student_BCHW, teacher_BCHW,
            weight_B1HW)`, or does not return a finite scalar with a gradient to the student.
    """
    found = choices.find(choices.FEATURE_LOSSES, name, KNOB)
    loss = found if isinstance(found, FeatureLoss) else FeatureLoss(found)
    choices.check_signature(loss.distance, ("student_BCHW", "teacher_BCHW", "weight_B1HW"), name, KNOB)
    if choices.is_own(name):
        _run_on_small_maps(loss, name)
    return loss


def _run_on_small_maps(loss: FeatureLoss, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student_BCHW, teacher_BCHW = torch.rand(2, 4, 4, 6, requires_grad=True), torch.rand(2, 3, 4, 6)
        try:
            value = loss.distance(loss.adapter(4, 3)(student_BCHW), teacher_BCHW, torch.rand(2, 1, 4, 6))
        except Exception as error:  # whatever the user's function raises
            reason = choices.blame(error, name.rpartition(":")[0])
            raise RecipeError(
                f"{KNOB}: {name} fails on a map of shape {tuple(teacher_BCHW.shape)}: {reason}"
            ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise RecipeError(f"{KNOB}: {name} returns {got}, expected a scalar tensor; average over the images")
    if not bool(torch.isfinite(value)):
        raise RecipeError(
            f"{KNOB}: {name} returns {float(value.detach())} for maps from 0 to 1, expected a finite number"
        )
    if not value.requires_grad:
        raise RecipeError(f"{KNOB}: {name} has no gradient to the student's map; compute with torch, without detach")
