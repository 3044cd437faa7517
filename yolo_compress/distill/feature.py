"""Feature losses: how far a student's map is from a teacher's, and the adapter that makes the two comparable.

A loss is a pure function `distance(student_BCHW, teacher_BCHW, weight_B1HW)`, a scalar with the gradient in the student
alone; `weight_B1HW` says how sure the teacher is that something is there, and most losses do without. The student's map comes
through an adapter, trained along and dropped with the teacher: a `FeatureLoss` pairs the two. `choices.FEATURE_LOSSES` names them.

Shapes: feat_BCHW, weight_B1HW; Q is the H x W locations in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.recipe import choices

KNOB = "distill.feature_loss"
EPSILON = 1e-9  # keeps an image set without any teacher score finite
FLAT = 1e-6  # under the standard deviation of any map that says something, above the rounding of one that does not
MOMENT_BYTES = 256 << 20  # of float64 at once where the aligners start; batch 32 at 640 px would take 1.4 GiB
MASKED = 0.65  # of the locations: MGD's share for one-stage detectors (arXiv 2205.01529)


def l2(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """FitNets' hint loss (arXiv 1412.6550, equation 3), as a mean: every location counts alike.

    Returns:
        Scalar, 0 for equal maps.
    """
    return F.mse_loss(student_BCHW, teacher_BCHW)


def weighted_l2(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Mean squared difference, each location weighted by how sure the teacher is that something is there.

    FitNets' hint loss (arXiv 1412.6550) with the weighting of Ultralytics' own distillation (`loss_sl2`, 8.4): without
    it the background, most of the map, decides.

    Returns:
        Scalar, 0 for equal maps.
    """
    squared = (student_BCHW - teacher_BCHW).square() * weight_B1HW
    return squared.sum() / (weight_B1HW.sum() * student_BCHW.shape[1] + EPSILON)


def channel_wise(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """CWD (arXiv 2011.13256): where a channel fires, as a distribution over locations.

    KL of the teacher's softmax over H x W against the student's, averaged over channels and images; T = 1, as MMRazor takes
    it for detectors. Adding a constant to a channel changes nothing.

    Returns:
        Scalar, 0 for equal maps.
    """
    student_BCQ, teacher_BCQ = (F.log_softmax(feat.flatten(2), dim=2) for feat in (student_BCHW, teacher_BCHW))
    divergence = F.kl_div(student_BCQ, teacher_BCQ, reduction="sum", log_target=True)
    return divergence / (student_BCHW.shape[0] * student_BCHW.shape[1])


def pearson(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """PKD (arXiv 2207.02039): one minus the correlation of each channel over images and locations, averaged.

    The paper's form, half the mean squared difference of the standardised maps, is the same number. Scale (above 0) and
    shift of a channel change nothing, so a teacher of other magnitudes can teach.

    Returns:
        Scalar in 0..2, 0 for equal maps.
    """
    student_BCHW, teacher_BCHW = _standardised(student_BCHW), _standardised(teacher_BCHW)
    return F.mse_loss(student_BCHW, teacher_BCHW) / 2


def _standardised(feat_BCHW: Tensor) -> Tensor:
    centred = feat_BCHW - feat_BCHW.mean(dim=(0, 2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True).sqrt() + FLAT)


def attention(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Attention transfer (arXiv 1612.03928, equation 2): where a map is strong, whatever its channels are.

    The sum of squares over channels, normalised over locations; the squared distance of the two, averaged over images, which
    is 2 - 2 cos. Squared, because the paper's plain norm has no gradient at 0. Widths may differ; the order of channels
    changes nothing.

    Returns:
        Scalar in 0..2, 0 for equal maps.
    """
    student_BQ, teacher_BQ = (
        F.normalize(feat.square().sum(dim=1).flatten(1), dim=1) for feat in (student_BCHW, teacher_BCHW)
    )
    return (student_BQ - teacher_BQ).square().sum(dim=1).mean()


def relation(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Tensor:
    """Similarity-preserving distillation (arXiv 1907.09682, equations 1 to 4): which images of a batch resemble each other.

    The Gram matrix over images, its rows normalised; the mean squared difference of the two. Widths may differ. One image has
    nothing to be compared with: the loss is 0.

    Returns:
        Scalar, 0 for equal maps.
    """
    student_BB, teacher_BB = (F.normalize(_gram(feat), dim=1) for feat in (student_BCHW, teacher_BCHW))
    return F.mse_loss(student_BB, teacher_BB)


def _gram(feat_BCHW: Tensor) -> Tensor:
    rows = feat_BCHW.flatten(1)
    return rows @ rows.T


class Aligner(nn.Conv2d):
    """A 1x1 convolution to the teacher's width, at first the identity where widths agree: equal nets start at a loss of 0.

    `start` then puts it at the ridge regression of the teacher's map on the student's. Channel i of a pruned net is not
    channel i of its parent: through the identity YOLOv8n's maps, cut to half of its MACs, are 2 to 6 times their variance away
    from the teacher's, through the regression 0.2 to 0.5 of it (`benchmarks/distillation.py aligners`).
    """

    started: Tensor  # a buffer, so that a resumed run does not start again

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, 1)
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> None:
        """Add the regression of what the identity leaves over (so equal maps keep the identity); once, of the first batch.

        Under torch.distributed the moments are those of all ranks, so that every rank starts alike.
        """
        if bool(self.started):
            return
        row_bytes = 8 * (2 * student_BCHW.shape[1] + 3 * teacher_BCHW.shape[1] + 2)
        images = max(1, MOMENT_BYTES // (row_bytes * student_BCHW[0, 0].numel()))
        moments = sum(map(self._moments, student_BCHW.split(images), teacher_BCHW.split(images)))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)
        assert isinstance(moments, Tensor)
        width, n = student_BCHW.shape[1], moments[-1, -1]
        moments = moments / n
        mean_C, mean_D = moments[-1, :width], moments[-1, width:-1]
        covariance_CC = moments[:-1, :width] - torch.outer(mean_C, mean_C)
        cross_CD = moments[:-1, width:-1] - torch.outer(mean_C, mean_D)
        # as many locations as channels say little; for other images this held as well as any smaller lambda at every level of BCCD
        ridge = width / n * covariance_CC.diagonal().mean().clamp(min=EPSILON)
        added_CD = torch.linalg.solve(covariance_CC + ridge * torch.eye(width).to(covariance_CC), cross_CD)
        self.weight += added_CD.T.to(self.weight).view_as(self.weight)
        self.bias += (mean_D - mean_C @ added_CD).to(self.weight)  # type: ignore[operator]
        self.started.fill_(True)

    def _moments(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """Sums over N locations of (own, 1) times (own, what the identity leaves of the teacher's, 1), in float64."""
        own_NC = student_BCHW.detach().movedim(1, 3).flatten(0, 2).double()
        left_ND = teacher_BCHW.detach().movedim(1, 3).flatten(0, 2).double()
        left_ND = left_ND - (own_NC @ self.weight.double().flatten(1).T + self.bias.double())  # type: ignore[union-attr]
        ones_N1 = own_NC.new_ones(len(own_NC), 1)
        return torch.cat([own_NC, ones_N1], dim=1).T @ torch.cat([own_NC, left_ND, ones_N1], dim=1)


class Generator(nn.Module):
    """MGD's generator (arXiv 2205.01529): rebuild the whole map from what a random mask leaves of it.

    The student has to put into every location what its neighbours need. Of equal maps the loss is therefore not 0, but what a
    third of a map cannot say about the rest. The mask is drawn by torch's global generator, which the trainer seeds by epoch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, feat_BCHW: Tensor) -> Tensor:
        kept_B1HW = torch.rand_like(feat_BCHW[:, :1]) >= MASKED
        return self.second(F.relu(self.first(feat_BCHW * kept_B1HW)))  # type: ignore[no-any-return]


def _generating(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Sequential(Aligner(student_channels, teacher_channels), Generator(teacher_channels))


def _as_it_is(student_channels: int, teacher_channels: int) -> nn.Module:
    return nn.Identity()


class FeatureLoss(NamedTuple):
    """A distance, and what makes the student's map (of a width) fit for it (at the teacher's)."""

    distance: Callable[[Tensor, Tensor, Tensor], Tensor]
    adapter: Callable[[int, int], nn.Module] = Aligner


MGD = FeatureLoss(l2, _generating)
ATTENTION = FeatureLoss(attention, _as_it_is)
RELATION = FeatureLoss(relation, _as_it_is)


def find(name: str) -> FeatureLoss:
    """A feature loss by its name in `choices.FEATURE_LOSSES`, or a user's own as `file.py:function`, which is tried on small maps.

    A function is a distance, and the student's maps reach it through an `Aligner`; a `FeatureLoss` brings its own adapter.

    Raises:
        RecipeError: No such name, file or function, no function of `(student_BCHW, teacher_BCHW, weight_B1HW)`, or what it
            returns is no finite scalar with a gradient to the student.
    """
    found = choices.find(choices.FEATURE_LOSSES, name, KNOB)
    loss = found if isinstance(found, FeatureLoss) else FeatureLoss(found)
    choices.check_signature(loss.distance, ("student_BCHW", "teacher_BCHW", "weight_B1HW"), name, KNOB)
    if choices.is_own(name):
        _try(loss, name)
    return loss


def _try(loss: FeatureLoss, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student_BCHW, teacher_BCHW = torch.rand(2, 4, 4, 6, requires_grad=True), torch.rand(2, 3, 4, 6)
        try:
            value = loss.distance(loss.adapter(4, 3)(student_BCHW), teacher_BCHW, torch.rand(2, 1, 4, 6))
        except Exception as error:  # whatever the user's function raises
            said = choices.blame(error, name.rpartition(":")[0])
            raise RecipeError(f"{KNOB}: {name} fails on a map of shape {tuple(teacher_BCHW.shape)}: {said}") from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise RecipeError(f"{KNOB}: {name} returns {got}, expected a scalar tensor; average over the images")
    if not bool(torch.isfinite(value)):
        raise RecipeError(f"{KNOB}: {name} returns {float(value.detach())} for maps of numbers from 0 to 1")
    if not value.requires_grad:
        raise RecipeError(f"{KNOB}: {name} has no gradient to the student's map; compute with torch, without detach")
