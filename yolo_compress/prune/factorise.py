"""Factorise a convolution into smaller ones of low rank, such that its output changes least on the calibration images.

The output error is E |D (y - y')|^2, where y is the output of the convolution and D is the factor by which its BatchNorm
multiplies it. Let x be the input without its mean. The covariance of its values under a kernel is taken to be a product: covariance of
the channels x correlation of neighbours in a column x correlation of neighbours in a row. With the square roots R of these three
matrices, the error is the squared norm of the difference of the tensors D W x_c R_c x_h R_h x_w R_w, which this file calls *whitened
weights*. For a matrix, the best low-rank approximation and its error come from the singular values (Eckart and Young). The error of a
rank is the sum of the squares of the singular values that it leaves out. For Tucker-2, the bases are those of the two unfoldings (De
Lathauwer et al., HOSVD), and the error is the squared norm of the part of the core tensor that is left out.

Whitening the input is as in DRONE (Chen et al., NeurIPS 2021) and ASVD (arXiv 2312.05821). D and the neighbours are ours.

Shapes: weight_OCHW has O output channels, C input channels and a kernel of H x W. r, s are ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.nets.factors import Factor, Scheme
from yolo_compress.prune.calibration_stats import Moments, moments_of
from yolo_compress.prune.reconstruct import RIDGE, add_ridge

LEAST_SCALE = 1e-6  # of a BatchNorm's factor, relative to the largest; a dead channel would divide by 0
Ranks = tuple[int, ...]  # two numbers for tucker, one for the others: channels after the first and the second factor


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the input of a convolution, and the correlation of values that are 1, 2, ... px apart (`column`, `row`)."""

    moments: Moments
    column: tuple[float, ...]
    row: tuple[float, ...]


class _Pairs:
    """Sums over pairs of values at one distance, to find their covariance, summed over the channels."""

    def __init__(self) -> None:
        self._product: float | Tensor = 0.0
        self._first_C: float | Tensor = 0.0
        self._second_C: float | Tensor = 0.0
        self._pixels = 0

    def add(self, first_BCHW: Tensor, second_BCHW: Tensor) -> None:
        """Add the pairs of a batch."""
        self._product = self._product + (first_BCHW * second_BCHW).sum().double()
        self._first_C = self._first_C + first_BCHW.sum((0, 2, 3)).double()
        self._second_C = self._second_C + second_BCHW.sum((0, 2, 3)).double()
        self._pixels += first_BCHW.numel() // first_BCHW.shape[1]

    def covariance(self) -> float:
        """Return the covariance of the two values of a pair, summed over the channels."""
        means = torch.as_tensor(self._first_C) * torch.as_tensor(self._second_C)
        return float(self._product / self._pixels - means.sum() / self._pixels**2)


def input_statistics(
    model: nn.Module, kernels: Mapping[str, int], batches: Iterable[Tensor]
) -> dict[str, InputStatistics]:
    """Return the statistics of the input of each convolution on the calibration images.

    Args:
        model: Stock model. It is not changed.
        kernels: Convolution -> size of its kernel. Correlations are measured for distances smaller than that.
        batches: Batches of images, `images_BCHW`, RGB 0 to 1, letterboxed.

    Raises:
        DataError, NumericsError: See `calibration_stats.input_moments`.
    """
    sums: dict[tuple[str, int, int], _Pairs] = {}  # (convolution, axis, distance) -> pairs of neighbours

    def observe(name: str, x_BCHW: Tensor) -> None:
        x_BCHW = x_BCHW.float()
        for axis in (2, 3):
            for distance in range(1, min(kernels[name], x_BCHW.shape[axis])):
                size = x_BCHW.shape[axis] - distance
                pairs = sums.setdefault((name, axis, distance), _Pairs())
                pairs.add(x_BCHW.narrow(axis, 0, size), x_BCHW.narrow(axis, distance, size))

    moments = moments_of(model, kernels, batches, observe)

    def correlations(name: str, axis: int) -> tuple[float, ...]:
        variance = float(moments[name].cov_CC.diagonal().sum())
        found = (sums.get((name, axis, distance)) for distance in range(1, kernels[name]))
        return tuple(pairs.covariance() / variance if pairs and variance > 0 else 0.0 for pairs in found)

    return {name: InputStatistics(moments[name], correlations(name, 2), correlations(name, 3)) for name in kernels}


@dataclass(frozen=True)
class _Root:
    """Symmetric square root of a positive definite matrix, and its inverse."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> _Root:
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(
            RIDGE * float(values.mean())
        )  # correlations of single distances need not fit together
        return cls((vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T)


class Factoriser:
    """Factorises one Conv block in every scheme and to every rank.

    Args:
        block: Conv block with BatchNorm, see `factors.can_factorise`. It is not changed.
        statistics: Statistics of its input. None: a white input, for tests of the weights alone.
    """

    def __init__(self, block: Any, statistics: InputStatistics | None) -> None:
        conv, norm = block.conv, block.bn
        self._conv = conv
        self.weight_OCHW = conv.weight.detach().double().cpu()
        out_channels, in_channels, height, width = self.weight_OCHW.shape
        scale_O = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().abs().double().cpu()
        self._scale_O = scale_O.clamp_min(LEAST_SCALE * max(float(scale_O.max()), LEAST_SCALE))
        identity = torch.eye(in_channels, dtype=torch.float64)
        self._mean_C = statistics.moments.mean_C if statistics else torch.zeros(in_channels, dtype=torch.float64)
        self._channels = _Root.of(add_ridge(statistics.moments.cov_CC) if statistics else identity)
        self._column = _Root.of(_toeplitz(statistics.column if statistics else (), height))
        self._row = _Root.of(_toeplitz(statistics.row if statistics else (), width))

    @cached_property
    def whitened_OCHW(self) -> Tensor:
        """The whitened weights. Their squared norm is the variance of the output, behind the factor of BatchNorm."""
        scaled = self.weight_OCHW * self._scale_O.view(-1, 1, 1, 1)
        return torch.einsum("ochw,cd,hi,wj->odij", scaled, self._channels.root, self._column.root, self._row.root)

    @cached_property
    def _power(self) -> float:
        return max(float(self.whitened_OCHW.square().sum()), torch.finfo(torch.float64).tiny)

    def errors(self, scheme: Scheme) -> Tensor:
        """Return the output error of every rank, relative to the variance of the output.

        Returns:
            Entry r is that of rank r, from 0 (nothing is left, error 1) to full rank (0). For tucker, entry (r, s).
        """
        if scheme == "tucker":
            first, last = self._tucker
            core = torch.einsum("ochw,cr,os->srhw", self.whitened_OCHW, first, last)
            kept_SR = core.square().sum((2, 3)).cumsum(0).cumsum(1)
            kept_RS = torch.nn.functional.pad(kept_SR, (1, 0, 1, 0)).T
            return (1 - kept_RS / self._power).clamp_min(0.0)
        left = self._svd(scheme)[1].square()
        discarded = left.flip(0).cumsum(0).flip(0)
        return torch.cat([discarded, discarded.new_zeros(1)]) / self._power

    def factors(self, scheme: Scheme, ranks: Ranks) -> list[Factor]:
        """Return the convolutions of a scheme with these ranks, in order. Their product is the best approximation of the block.

        Between two convolutions, every channel has the variance 1. So all channels of a tensor use the INT8 range alike.
        """
        stride, padding = self._conv.stride, self._conv.padding
        if scheme == "mix":
            left_OR, values_R, right_RN = self._svd("mix", ranks[0])
            first = self._unwhiten(right_RN.view(-1, *self.whitened_OCHW.shape[1:]))
            last = (left_OR * values_R)[:, :, None, None]
            return [self._inner(first, stride, padding), Factor(self._unscaled(last), (1, 1), (0, 0))]
        if scheme == "reduce":
            left_CR, values_R, right_RN = self._svd("reduce", ranks[0])
            out_channels, _, height, width = self.whitened_OCHW.shape
            first = self._unwhiten(left_CR.T[:, :, None, None])
            core = (right_RN * values_R[:, None]).view(-1, out_channels, height, width).transpose(0, 1)
            return [self._inner(first, (1, 1), (0, 0)), Factor(self._unscaled(core), stride, padding)]
        if scheme == "spatial":
            out_channels, in_channels, height, width = self.whitened_OCHW.shape
            left_NR, values_R, right_RM = self._svd("spatial", ranks[0])
            first = self._unwhiten(left_NR.T.reshape(-1, in_channels, height, 1))
            last = (right_RM * values_R[:, None]).view(-1, out_channels, 1, width).transpose(0, 1)
            return [
                self._inner(first, (stride[0], 1), (padding[0], 0)),
                Factor(self._unscaled(last), (1, stride[1]), (0, padding[1])),
            ]
        first_CR, last_OS = self._tucker[0][:, : ranks[0]], self._tucker[1][:, : ranks[1]]
        core = torch.einsum("ochw,cr,os->srhw", self.whitened_OCHW, first_CR, last_OS)
        size_S = core.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        core = self._unwhiten_kernel(core) / size_S.view(-1, 1, 1, 1)
        reduce = self._inner(self._unwhiten(first_CR.T[:, :, None, None]), (1, 1), (0, 0))
        assert reduce.mean_O is not None
        mean_S = torch.einsum("srhw,r->s", core, reduce.mean_O)
        expand = (last_OS * size_S)[:, :, None, None]
        return [
            reduce,
            Factor(core, stride, padding, mean_S, torch.ones_like(mean_S)),
            Factor(self._unscaled(expand), (1, 1), (0, 0)),
        ]

    def lost_mean_O(self, factors: list[Factor]) -> Tensor:
        """Return the mean output of the block minus that of its factors, before BatchNorm, shape (O,)."""
        before = factors[-2].mean_O
        assert before is not None
        whole_O = torch.einsum("ochw,c->o", self.weight_OCHW, self._mean_C)
        return whole_O - torch.einsum("ochw,c->o", factors[-1].weight_OIHW, before)

    def _inner(self, weight_OIHW: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Factor:
        mean_O = torch.einsum("oihw,i->o", weight_OIHW, self._mean_C)
        return Factor(weight_OIHW, stride, padding, mean_O, torch.ones_like(mean_O))

    def _unwhiten(self, weight_RCHW: Tensor) -> Tensor:
        """Multiply the channels of the block's input, and the kernel, by the inverse roots."""
        return self._unwhiten_kernel(torch.einsum("rchw,cd->rdhw", weight_RCHW, self._channels.inverse))

    def _unwhiten_kernel(self, weight: Tensor) -> Tensor:
        """Multiply the kernel by the inverse roots. A side of 1 px has none, since the other factor has the kernel of that side."""
        if weight.shape[2] > 1:
            weight = torch.einsum("ochw,hi->ociw", weight, self._column.inverse)
        return torch.einsum("ochw,wj->ochj", weight, self._row.inverse) if weight.shape[3] > 1 else weight

    def _unscaled(self, weight_ORHW: Tensor) -> Tensor:
        """Return the last factor as the BatchNorm reads it: with its kernel unwhitened, and without D."""
        return self._unwhiten_kernel(weight_ORHW) / self._scale_O.view(-1, 1, 1, 1)

    def _svd(self, scheme: Scheme, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return left vectors, singular values and right vectors of the whitened weights as a matrix, the first `rank` of them."""
        left, values, right = self._decomposed(scheme)
        return left[:, :rank], values[:rank], right[:rank]

    def _decomposed(self, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
        if scheme not in self._known:
            tensor, (first, last) = self.whitened_OCHW, self._tucker
            if scheme == "mix":
                found = _singular(tensor.flatten(1), last)  # O x CHW
            elif scheme == "reduce":
                found = _singular(tensor.transpose(0, 1).flatten(1), first)  # C x OHW
            else:
                matrix = tensor.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)  # CH x OW
                if len(matrix) <= matrix.shape[1]:
                    found = _singular(matrix, _basis(matrix))
                else:
                    left, values, right = _singular(matrix.T, _basis(matrix.T))
                    found = right.T, values, left.T
            self._known[scheme] = found
        return self._known[scheme]

    @cached_property
    def _known(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        return {}

    @cached_property
    def _tucker(self) -> tuple[Tensor, Tensor]:
        """Bases of the input channels (C, C) and of the output channels (O, O), most important first."""
        tensor = self.whitened_OCHW
        return tuple(_basis(tensor.transpose(0, mode).flatten(1)) for mode in (1, 0))  # type: ignore[return-value]


def _basis(unfolded_CN: Tensor) -> Tensor:
    """Return the left singular vectors, by falling singular values, shape (C, C)."""
    return torch.linalg.eigh(unfolded_CN @ unfolded_CN.T)[1].flip(1)


def _singular(matrix_MN: Tensor, left_MM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return left vectors, singular values and right vectors of a matrix whose left vectors are known.

    Their product is the matrix, also where a singular value is 0. This is several times faster than `torch.linalg.svd`.
    """
    projected_MN = left_MM.T @ matrix_MN
    values_M = projected_MN.norm(dim=1)
    return left_MM, values_M, projected_MN / values_M.clamp_min(torch.finfo(torch.float64).tiny)[:, None]


def _toeplitz(correlations: tuple[float, ...], size: int) -> Tensor:
    """Return the correlation matrix of `size` neighbours, from the correlations at distances 1, 2, ...; white if there are none."""
    at = [1.0, *correlations, *[0.0] * size]
    return torch.tensor([[at[abs(i - j)] for j in range(size)] for i in range(size)], dtype=torch.float64)


@torch.no_grad()
def refit_last(
    model: nn.Module, chains: Mapping[str, nn.Sequential], batches: Iterable[Tensor], run: Callable[[Tensor], object]
) -> None:
    """Refit the last convolution of each chain by least squares, so that the output is nearest to that of the whole block, in place.

    This is the least-squares step of `reconstruct`, for factors. Here the covariances are those of the images, where `Factoriser` has
    a product in their place. The fit is of what the last convolution misses: a chain that misses nothing does not change.

    Args:
        model: Model with the whole blocks. It is not changed.
        chains: Block -> its chain, not yet in the model. The BatchNorm of the last factor is adapted to the new mean.
        batches: Calibration images.
        run: Function that runs the model on a batch, in evaluation mode.
    """
    sums: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}

    def record(name: str, x_BCHW: Tensor, y_BOHW: Tensor) -> None:
        *inner, last = chains[name]
        for part in inner:
            x_BCHW = part(x_BCHW)
        conv: Any = last.conv
        missed_BOHW = y_BOHW - conv(x_BCHW)
        z_BKL = nn.functional.unfold(x_BCHW, conv.kernel_size, padding=conv.padding, stride=conv.stride)
        z_KN, e_ON = z_BKL.transpose(0, 1).flatten(1), missed_BOHW.transpose(0, 1).flatten(1)
        parts = [(z_KN @ z_KN.T), (e_ON @ z_KN.T), z_KN.sum(1), e_ON.sum(1)]
        totals = sums.setdefault(name, [torch.zeros_like(part, dtype=torch.float64) for part in parts])
        for total, part in zip(totals, parts, strict=True):
            total += part.double()
        counts[name] = counts.get(name, 0) + z_KN.shape[1]

    handles = [
        model.get_submodule(f"{name}.conv").register_forward_hook(
            lambda _, inputs, output, name=name: record(name, inputs[0], output)
        )
        for name in chains
    ]
    for chain in chains.values():
        chain.eval()
    try:
        for images_BCHW in batches:
            run(images_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    for name, (zz_KK, ez_OK, z_K, e_O) in sums.items():
        count, conv = counts[name], chains[name][-1].conv
        mean_K, mean_O = z_K / count, e_O / count
        cov_KK, cov_OK = zz_KK / count - torch.outer(mean_K, mean_K), ez_OK / count - torch.outer(mean_O, mean_K)
        cov_KK = add_ridge((cov_KK + cov_KK.T) / 2)
        change_OK = torch.linalg.solve(cov_KK, cov_OK.T).T
        conv.weight.add_(change_OK.view_as(conv.weight).to(conv.weight))
        norm: Any = chains[name][-1].bn
        norm.running_mean.sub_((mean_O - change_OK @ mean_K).to(norm.running_mean))
