"""A pruning criterion of your own: which channels of a group go first.

    yolo-compress prune recipe=digits prune.criterion=examples/custom_criterion.py:widest_spread

The function gets the evidence (model, channel groups, calibration images) and one channel group. It returns one number
per channel: the importance. The channels with the lowest importance are removed first.
"""

import torch


def widest_spread(evidence, group):
    """Standard deviation of the filters that write each channel."""
    spread_C = torch.zeros(group.width)
    for member in group.having("out"):
        weight = evidence.model.get_submodule(member.module).weight.detach()
        spread_C += weight[member.offset : member.offset + group.width].float().flatten(1).std(1)
    return spread_C
