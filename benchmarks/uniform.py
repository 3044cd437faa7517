"""The control of every pruning: a narrower YOLOv8 of the same MACs, every width scaled alike, started from the leading channels.

    yolo-compress prune recipe=bccd prune.criterion=benchmarks/uniform.py:uniform prune.reconstruct=false

Same budget, schedule, teacher and BatchNorm re-estimation as a pruned net; only which channels stay is no choice, which is
what `width_multiple` and copying the weights that fit come to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.graph import Group


def uniform(evidence: Evidence, group: Group) -> Tensor:
    """The first channels stay."""
    return torch.arange(group.width, 0, -1, dtype=torch.float32)
