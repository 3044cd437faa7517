"""Optimal brain surgeon for channels: which to remove when those that stay may take over.

Shapes: cov_CC, inverse_CC, energy_CC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_compress.prune.evidence import Evidence
from yolo_compress.prune.graph import Group
from yolo_compress.prune.reconstruct import ridged


@dataclass
class _Reader:
    """One convolution that reads the group: inverse covariance of what it reads, W^T W of what it makes of it."""

    inverse_CC: Tensor
    energy_CC: Tensor

    def cost_C(self) -> Tensor:
        """Squared error of this convolution's output when a channel goes and the others make up for it."""
        return (self.energy_CC.diagonal() / self.inverse_CC.diagonal()).clamp_min(0.0)

    def remove(self, c: int) -> None:
        """Take channel c out, its weights moved onto the others: one step of Gaussian elimination."""
        row_C, pivot = self.inverse_CC[c].clone(), self.inverse_CC[c, c].clone()
        share_C, column_C = row_C / pivot, self.energy_CC[c].clone()
        self.energy_CC += column_C[c] * torch.outer(share_C, share_C)
        self.energy_CC -= torch.outer(column_C, share_C) + torch.outer(share_C, column_C)
        self.inverse_CC -= torch.outer(row_C, share_C)
        for matrix in (self.energy_CC, self.inverse_CC):
            matrix[c, :] = 0.0
            matrix[:, c] = 0.0
        self.inverse_CC[c, c] = 1.0


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
    gone_C = torch.zeros(group.width, dtype=torch.bool)
    error = 0.0
    for _ in range(group.width):
        cost_C = torch.zeros(group.width, dtype=torch.float64)
        for reader in readers:
            cost_C += reader.cost_C()
        channel = int(cost_C.masked_fill(gone_C, torch.inf).argmin())
        error += float(cost_C[channel])
        score_C[channel] = error
        gone_C[channel] = True
        for reader in readers:
            reader.remove(channel)
    return score_C.float()


def _reader(evidence: Evidence, group: Group, name: str, offset: int) -> _Reader:
    weight_CN = evidence.model.get_submodule(name).weight.detach().double().cpu().transpose(0, 1).flatten(1)
    cov_CC = evidence.moments[name].cov_CC
    variance = ((weight_CN @ weight_CN.T) * cov_CC).sum().clamp_min(torch.finfo(torch.float32).tiny)
    own = slice(offset, offset + group.width)
    energy_CC = weight_CN[own] @ weight_CN[own].T / variance
    return _Reader(torch.linalg.inv(ridged(cov_CC[own, own])), energy_CC)
