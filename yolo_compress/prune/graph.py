"""Find channel groups of a model and remove channels from it. A channel group is a set of channels that must be removed together.

The data flow of the model's family (`nets.flow`) says which parts of convolutions and BatchNorms share channels. Channels are removed
with one index_select per tensor, so all modules keep their stock classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets import families
from yolo_compress.nets.conv import keep_channels
from yolo_compress.nets.flow import Member

__all__ = ["Group", "Member", "check_keep", "prunable", "prune"]


@dataclass(frozen=True)
class Group:
    """Channels that must be removed together: channel i of the group is channel `offset + i` of every member.

    Attributes:
        name: the first slice of a convolution's output that holds the channels (`model.1`, `model.2.cv1a`, `model.22.cv2.0.1`).
        width: number of channels.
        tie: key of a set of groups that must lose equal shares of their channels, such as the two halves of a C2f block. If no
            other group is in the set, this is the name of the group.
        members: convolutions that write or read the channels, and their BatchNorms, by module name.
        step: number of channels by which the width changes when each group of the tie loses as little as possible. It is 1 for the
            narrowest groups of a tie.
    """

    name: str
    width: int
    tie: str
    members: tuple[Member, ...]
    step: int = 1

    @property
    def steps(self) -> int:
        """The width in steps. It is equal for all groups of a tie."""
        return self.width // self.step

    @property
    def unit(self) -> int:
        """Largest power of two that divides `steps`. The group's new width cannot be rounded to a larger multiple of `step`."""
        return self.steps & -self.steps

    def having(self, role: str) -> tuple[Member, ...]:
        """Return the members whose role is `role`: "out", "in" or "norm"."""
        return tuple(member for member in self.members if member.role == role)


def prunable(model: nn.Module) -> list[Group]:
    """Return the channel groups that can be pruned, in the order of the model's modules.

    They contain all channels except those of the input images, the outputs of the model, and `Flow.fixed`.

    Raises:
        RecipeError, NumericsError: See `families.check_prunable`.
    """
    flow = families.check_prunable(model)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = {piece: tuple(members) for piece, members in flow.members.items() if piece not in flow.fixed}
    ties = {piece: flow.ties.get(piece, piece) for piece in found}
    least = {tie: min(flow.widths[piece] for piece in found if ties[piece] == tie) for tie in ties.values()}
    groups = [
        Group(piece, width := flow.widths[piece], ties[piece], members, width // least[ties[piece]])
        for piece, members in found.items()
    ]
    return sorted(groups, key=lambda group: (order[group.members[0].module], group.members[0].offset))


@torch.inference_mode(False)
def prune(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Remove channels from a model, in place. Each group in `keep` loses all channels that are not listed there.

    The modules keep their Ultralytics classes, and `model.yaml` does not change. Ultralytics' own trainer rebuilds a model from
    `model.yaml`, so that trainer cannot train a pruned model.

    Args:
        model: Stock model, pruned or not.
        keep: Group name -> ascending indices of the channels to keep. Groups that are not in `keep` keep all channels.

    Raises:
        RecipeError: See `check_keep` and `families.check_prunable`.
        NumericsError: See `families.check_prunable`.
    """
    groups = prunable(model)
    check_keep(groups, keep)
    removed: dict[tuple[str, bool], list[Tensor]] = {}  # (module, is input side) -> removed channels
    for group in groups:
        if group.name in keep:
            mask = torch.ones(group.width, dtype=torch.bool)
            mask[keep[group.name].cpu()] = False
            removed_channels = mask.nonzero().flatten()
            for member in group.members:
                removed.setdefault((member.module, member.role == "in"), []).append(removed_channels + member.offset)
    for name, module in list(model.named_modules()):
        out, inputs = removed.get((name, False)), removed.get((name, True))
        if out is not None or inputs is not None:
            keep_channels(module, _remaining(out, module.weight, 0), _remaining(inputs, module.weight, 1))
    families.refresh_attributes(model)


def check_keep(groups: Iterable[Group], keep: Mapping[str, Tensor]) -> None:
    """Check that the lists of channels to keep are valid for these groups. `keep` is as for `prune`.

    Raises:
        RecipeError: A group is unknown, a list is empty, unsorted or out of range, or groups with the same `tie` would keep
            different shares of their channels.
    """
    by_name = {group.name: group for group in groups}
    for name, index in keep.items():
        if name not in by_name:
            raise RecipeError(f"prune: unknown group {name!r}, expected one of {', '.join(by_name)}")
        width, values = by_name[name].width, index.tolist()
        if not values or values != sorted(set(values)) or values[0] < 0 or values[-1] >= width:
            raise RecipeError(
                f"prune: keep-list of {name} must be ascending, not empty, within 0..{width - 1}; got {values}"
            )
    firsts: dict[str, tuple[Group, int]] = {}
    for group in by_name.values():
        count = len(keep[group.name]) if group.name in keep else group.width
        first, expected = firsts.setdefault(group.tie, (group, count))
        if count * first.step != expected * group.step or count % group.step:
            raise RecipeError(
                f"prune: {first.name} keeps {expected} of {first.width} channels and {group.name} {count} of {group.width}; "
                "parts of a block must keep equal shares"
            )


def _remaining(removed: list[Tensor] | None, weight: Tensor, dim: int) -> Tensor | None:
    if removed is None:
        return None
    mask = torch.ones(weight.shape[dim], dtype=torch.bool)
    mask[torch.cat(removed)] = False
    return mask.nonzero().flatten()
