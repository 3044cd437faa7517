"""Optimal brain surgeon for channels: which to remove when those that stay may take over.

Shapes: cov_CC, inverse_CC, energy_CC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.graph import Group
from yolo_compress.prune.reconstruct import ridged

COMPACT = 0.2  # matrices shrink when this share of their channels is gone


@dataclass
class _Reader:
    """One convolution that reads the group: inverse covariance of what it reads, W^T W of what it makes of it."""

    inverse_CC: Tensor
    energy_CC: Tensor

    def cost_C(self) -> Tensor:
        """Squared error of this convolution's output when a channel goes and the others make up for it."""
        return (self.energy_CC.diagonal() / self.inverse_CC.diagonal()).clamp_min(0.0)

    def remove(self, c: int) -> None:
        """Take channel c out, its weights moved onto the others: one step of Gaussian elimination, by rank-one updates."""
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
        """Forget the channels that are gone: what is left is a smaller problem of the same kind."""
        self.inverse_CC, self.energy_CC = (m[index_K][:, index_K] for m in (self.inverse_CC, self.energy_CC))


def obs(evidence: Evidence, group: Group) -> Tensor:
    """Output error of the layers that read the channel once it and all that went before are gone and reconstructed.

    Channels leave one by one, each time the one whose loss the others can make up for best (Hassibi and Stork 1993 for
    weights; for whole channels ZipLM, Kurtic et al., arXiv 2302.04089, algorithm 1), and the score of a channel is the
    error at its turn, relative to the output's variance and summed over readers: it grows from channel to channel, so
    redundant layers are thinned first, and it is comparable between layers. Meant for `reconstruct`, which it predicts.

    Raises:
        DataError, NumericsError: see `Evidence.moments`.
    """
    readers = [_reader(evidence, group, member.module, member.offset) for member in group.having("in")]
    score_C = torch.zeros(group.width, dtype=torch.float64)
    left_K = torch.arange(group.width)  # channels that the readers still hold
    gone_K = torch.zeros(group.width, dtype=torch.bool)
    error = 0.0
    for _ in range(group.width):
        cost_K = torch.zeros(len(left_K), dtype=torch.float64)
        for reader in readers:
            cost_K += reader.cost_C()
        k = int(cost_K.masked_fill(gone_K, torch.inf).argmin())
        error += float(cost_K[k])
        score_C[left_K[k]] = error
        gone_K[k] = True
        for reader in readers:
            reader.remove(k)
        if int(gone_K.sum()) > COMPACT * len(left_K):
            stay = (~gone_K).nonzero().flatten()
            left_K, gone_K = left_K[stay], gone_K[stay]
            for reader in readers:
                reader.keep(stay)
    return score_C.float()


def _reader(evidence: Evidence, group: Group, name: str, offset: int) -> _Reader:
    weight_CN = evidence.model.get_submodule(name).weight.detach().double().cpu().transpose(0, 1).flatten(1)
    cov_CC = evidence.moments[name].cov_CC
    variance = ((weight_CN @ weight_CN.T) * cov_CC).sum().clamp_min(torch.finfo(torch.float32).tiny)
    own = slice(offset, offset + group.width)
    energy_CC = weight_CN[own] @ weight_CN[own].T / variance
    return _Reader(torch.linalg.inv(ridged(cov_CC[own, own])), energy_CC)
