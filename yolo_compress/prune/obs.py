"""Criterion `obs`, Optimal Brain Surgeon for channels: output error after the remaining channels compensate for removed ones.

Shapes: cov_CC, inverse_CC, energy_CC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.graph import Group
from yolo_compress.prune.reconstruct import add_ridge

COMPACT = 0.2  # matrices are reduced when this share of their channels is removed


@dataclass
class _Reader:
    """Matrices of a convolution that reads the channels of the scored group.

    Attributes:
        inverse_CC: inverse covariance of the convolution's input channels.
        energy_CC: W^T W of the convolution's weights W, divided by the variance of its output.
    """

    inverse_CC: Tensor
    energy_CC: Tensor

    def cost_C(self) -> Tensor:
        """Return, for each channel, the squared output error if this channel is removed and the others compensate."""
        return (self.energy_CC.diagonal() / self.inverse_CC.diagonal()).clamp_min(0.0)

    def remove(self, c: int) -> None:
        """Remove channel `c` and let the other channels compensate: one step of Gaussian elimination by rank-one updates."""
        row_C, column_C = self.inverse_CC[c].clone(), self.energy_CC[c].clone()
        share_C = row_C / row_C[c]
        half_C = column_C - 0.5 * column_C[c] * share_C
        self.energy_CC.addr_(half_C, share_C, alpha=-1.0).addr_(share_C, half_C, alpha=-1.0)
        self.inverse_CC.addr_(row_C, share_C, alpha=-1.0)
        for matrix in (self.energy_CC, self.inverse_CC):
            matrix[c, :] = 0.0
            matrix[:, c] = 0.0
        self.inverse_CC[c, c] = 1.0

    def keep(self, index_K: Tensor) -> None:
        """Reduce the matrices to the channels `index_K`."""
        self.inverse_CC, self.energy_CC = (m[index_K][:, index_K] for m in (self.inverse_CC, self.energy_CC))


def obs(evidence: Evidence, group: Group) -> Tensor:
    """Score a channel by the output error of the next layers, after this channel and all less important channels are removed.

    Channels are removed one at a time. Each step removes the channel for which the other channels compensate best. The method is by
    Hassibi and Stork (1993) for weights, and by Kurtic et al. (ZipLM, arXiv 2302.04089, algorithm 1) for channels. The score of a
    channel is the total error when it is removed. The error is relative to the variance of the output, and summed over all
    convolutions that read the group.

    The error grows with every removed channel, so redundant layers lose channels first. Errors are comparable between layers. The
    scores predict the error after `reconstruct.reconstruct`, so use this criterion together with reconstruction.

    Raises:
        DataError, NumericsError: See `Evidence.moments`.
    """
    readers = [_reader(evidence, group, member.module, member.offset) for member in group.having("in")]
    score_C = torch.zeros(group.width, dtype=torch.float64)
    remaining_K = torch.arange(group.width)  # channels that the matrices still contain
    removed_K = torch.zeros(group.width, dtype=torch.bool)
    error = 0.0
    for _ in range(group.width):
        cost_K = torch.zeros(len(remaining_K), dtype=torch.float64)
        for reader in readers:
            cost_K += reader.cost_C()
        k = int(cost_K.masked_fill(removed_K, torch.inf).argmin())
        error += float(cost_K[k])
        score_C[remaining_K[k]] = error
        removed_K[k] = True
        for reader in readers:
            reader.remove(k)
        if int(removed_K.sum()) > COMPACT * len(remaining_K):
            index_K = (~removed_K).nonzero().flatten()
            remaining_K, removed_K = remaining_K[index_K], removed_K[index_K]
            for reader in readers:
                reader.keep(index_K)
    return score_C.float()


def _reader(evidence: Evidence, group: Group, name: str, offset: int) -> _Reader:
    weight_CN = evidence.model.get_submodule(name).weight.detach().double().cpu().transpose(0, 1).flatten(1)
    cov_CC = evidence.moments[name].cov_CC
    variance = ((weight_CN @ weight_CN.T) * cov_CC).sum().clamp_min(torch.finfo(torch.float32).tiny)
    channels = slice(offset, offset + group.width)
    energy_CC = weight_CN[channels] @ weight_CN[channels].T / variance
    return _Reader(torch.linalg.inv(add_ridge(cov_CC[channels, channels])), energy_CC)
