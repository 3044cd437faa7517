"""Find channel groups of a model and remove channels from it. A channel group is a set of channels that must be removed together.

DepGraph (Fang et al., arXiv 2301.12900) finds the slices of convolutions and BatchNorms that share channels. It traces a copy of
the model without weights, in the split view, where blocks that DepGraph cannot follow are divided (see `nets.yolov8`). Groups use
the module names of the stock model. A block of the split view is a slice of a stock block, at a channel offset. Importance, budget
and removal therefore work on stock classes.

Channels are removed with one index_select per tensor. DepGraph's own removal is not used: it rebuilds every tensor once per group
and loses `requires_grad`. No other file imports torch_pruning (1.6.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect, families
from yolo_compress.nets.conv import keep_channels
from yolo_compress.nets.family import Part
from yolo_compress.nets.meta_copy import blank_images, shadow

_TRACE_HW = (64, 64)  # 2 x 2 cells at stride 32: the smallest image for which no feature map is 1 x 1


@dataclass(frozen=True)
class Member:
    """The slice of a module that belongs to a channel group: `group.width` channels, starting at channel `offset`.

    The side `role` tells whether they are output channels, input channels or BatchNorm features.
    """

    module: str
    role: Literal["out", "in", "norm"]  # output or input channels of a Conv2d, features of a BatchNorm2d
    offset: int


@dataclass(frozen=True)
class Group:
    """Channels that must be removed together: channel i of the group is channel `offset + i` of every member.

    Attributes:
        name: the first convolution that writes the channels, in the split view (`model.1`, `model.2.cv1a`, `model.22.cv2.0.1`).
        width: number of channels.
        tie: key of a set of groups that must keep equal numbers of channels, such as the two halves of a C2f block. If the group is
            alone in its set, the key is its name.
        members: convolutions that write or read the channels, and their BatchNorms, by module name in the stock model.
    """

    name: str
    width: int
    tie: str
    members: tuple[Member, ...]

    @property
    def unit(self) -> int:
        """Largest power of two that divides `width`. The group's new width cannot be rounded to a larger multiple."""
        return self.width & -self.width

    def having(self, role: str) -> tuple[Member, ...]:
        """Return the members whose role is `role`: "out", "in" or "norm"."""
        return tuple(member for member in self.members if member.role == role)


@torch.inference_mode(False)  # tensors created in inference mode cannot be traced or trained
def prunable(model: nn.Module) -> list[Group]:
    """Return the channel groups that can be pruned, in order of execution.

    The groups contain all channels, except the channels of the input images and of the outputs of the model (`Family.outputs`).

    Raises:
        RecipeError, NumericsError: See `families.check_prunable`.
    """
    family = families.check_prunable(model)
    parts = family.parts(model)
    split = family.split(shadow(model))
    graph = _trace(split)
    names = {module: name for name, module in split.named_modules()}
    outputs = set(family.outputs(model))
    groups: list[Group] = []
    seen: set[str] = set()
    for name, module in split.named_modules():
        if not isinstance(module, nn.Conv2d) or module not in graph.module2node or name in seen | outputs:
            continue
        found = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, list(range(module.out_channels)))
        members = _members(found, names, graph)
        seen.update(member.module for member in members if member.role == "out")
        if seen & outputs:
            raise RecipeError(
                f"prune: the channels of {name} are outputs of the model; only the stock architecture is supported"
            )
        groups.append(_group(name.removesuffix(".conv"), module.out_channels, members, parts))
    return groups


@torch.inference_mode(False)
def prune(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Remove channels from a model, in place. Each group in `keep` loses all channels that are not listed there.

    The modules keep their Ultralytics classes, and `model.yaml` does not change. Ultralytics' own trainer rebuilds a model from
    `model.yaml`, so that trainer cannot train a pruned model.

    Args:
        model: Stock model, pruned or not.
        keep: Group name -> ascending indices of the channels to keep. Groups that are not in `keep` keep all channels.

    Raises:
        RecipeError: A group is unknown, or a list of indices is empty, unsorted or out of range. Or groups with the same `tie`
            would keep different numbers of channels.
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
    families.refresh_attributes(model, families.family_of(model, "prune"))


def check_keep(groups: Iterable[Group], keep: Mapping[str, Tensor]) -> None:
    """Check that the lists of channels to keep are valid for these groups. `keep` is as for `prune`.

    Raises:
        RecipeError: A group is unknown, or a list is empty, unsorted or out of range. Or groups with the same `tie` would keep
            different numbers of channels.
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
    counts: dict[str, tuple[str, int]] = {}
    for group in by_name.values():
        count = len(keep[group.name]) if group.name in keep else group.width
        first, expected = counts.setdefault(group.tie, (group.name, count))
        if count != expected:
            raise RecipeError(
                f"prune: {first} keeps {expected} channels and {group.name} {count}; parts of a block must keep equally many"
            )


def _trace(split: nn.Module) -> torch_pruning.DependencyGraph:
    with torch.enable_grad():  # DepGraph reads the autograd graph, even if the caller has disabled gradients
        return torch_pruning.DependencyGraph().build_dependency(
            split,
            blank_images(split, _TRACE_HW),
            forward_fn=detect.raw_outputs,  # decoding would mix the output channels with anchors
            unwrapped_parameters=[],
            customized_pruners={},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )


def _members(
    found: torch_pruning.Group, names: Mapping[nn.Module, str], graph: torch_pruning.DependencyGraph
) -> list[Member]:
    """Return the members of a DepGraph group: its convolutions and BatchNorms, with their module names in the split view.

    Each run of consecutive channels of a module is one member.
    """
    members = []
    width = len(found[0].idxs)
    for item in found.items:
        module = item.dep.target.module
        if not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            continue  # element-wise operations and concats have no parameters
        if isinstance(module, nn.BatchNorm2d):
            role: Literal["out", "in", "norm"] = "norm"
        else:
            role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        runs: dict[int, list[int]] = {}
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            runs.setdefault(index - root, []).append(root)
        for offset, roots in sorted(runs.items()):
            if sorted(roots) != list(range(width)):
                raise RecipeError(
                    f"prune: {names[module]} shares only some channels of a group; only the stock architecture is supported"
                )
            members.append(Member(names[module], role, offset))
    return members


def _group(name: str, width: int, members: Iterable[Member], parts: Mapping[str, Part]) -> Group:
    tie = parts[name].stock if name in parts else name
    # The slices of a block read the same input, so their input side is one member.
    stock = dict.fromkeys(_stock_member(member, parts) for member in members)
    return Group(name, width, tie, tuple(stock))


def _stock_member(member: Member, parts: Mapping[str, Part]) -> Member:
    """Convert a member of the split view to the module name and channel offset of the stock model."""
    block, _, module = member.module.rpartition(".")
    if block not in parts:
        return member
    shift = parts[block].offset if member.role != "in" else 0
    return Member(f"{parts[block].stock}.{module}", member.role, member.offset + shift)


def _remaining(removed: list[Tensor] | None, weight: Tensor, dim: int) -> Tensor | None:
    if removed is None:
        return None
    mask = torch.ones(weight.shape[dim], dtype=torch.bool)
    mask[torch.cat(removed)] = False
    return mask.nonzero().flatten()
