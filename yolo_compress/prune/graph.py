"""Which channels go together, and the surgery that removes them; the one door to torch_pruning (1.6.1).

DepGraph (Fang et al., arXiv 2301.12900) traces a weightless copy of the model in the split view of its family and says which
slices of which convolutions and BatchNorms share a channel. Groups are then written in the names of the stock model, a part of a
block being a slice of it at an offset, so importance, budget and surgery work on stock classes and never convert the real model.
The surgery is one index_select a tensor: DepGraph's own rebuilds every tensor once a group and forgets `requires_grad`.
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

_TRACE_HW = (64, 64)  # two pixels at stride 32: the smallest image on which no concat partner degenerates to 1 x 1


@dataclass(frozen=True)
class Member:
    """A slice of one module that belongs to a group: channels `offset` to `offset + group.width` of its side `role`."""

    module: str
    role: Literal["out", "in", "norm"]  # output or input channels of a Conv2d, features of a BatchNorm2d
    offset: int


@dataclass(frozen=True)
class Group:
    """Channels that live and die together: channel i of the group is channel `offset + i` of every member.

    Attributes:
        name: the first convolution that writes these channels, in the split view (`model.1`, `model.2.cv1a`, `model.22.cv2.0.1`).
        width: channels.
        tie: groups of one tie keep equally many channels, though not the same ones: the parts of a block. Else the name.
        members: names of modules of the stock model; writers and readers of the channels and their BatchNorms.
    """

    name: str
    width: int
    tie: str
    members: tuple[Member, ...]

    @property
    def unit(self) -> int:
        """Largest power of two that divides `width`: rounding to more than this would not keep the original width valid."""
        return self.width & -self.width

    def having(self, role: str) -> tuple[Member, ...]:
        """Members of one role."""
        return tuple(member for member in self.members if member.role == role)


@torch.inference_mode(False)  # tensors made in inference mode, the caller's or not, cannot be traced or trained
def prunable(model: nn.Module) -> list[Group]:
    """Groups of every channel of a supported model that can go, in order of execution; `model` is not changed.

    That is all but the images' channels and the outputs of the model (`Family.outputs`).

    Raises:
        RecipeError, NumericsError: see `families.check_prunable`.
    """
    family = families.check_prunable(model)
    parts = family.parts(model)
    split = family.split(shadow(model))
    graph = _traced(split)
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
            raise RecipeError(f"prune: the channels of {name} are outputs of the model; only stock wiring is supported")
        groups.append(_group(name.removesuffix(".conv"), module.out_channels, members, parts))
    return groups


@torch.inference_mode(False)
def prune(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Keep the listed channels of each group and remove the others, in place; classes stay stock, `model.yaml` stays as it was.

    Ultralytics' own trainer rebuilds a model from its yaml, so a pruned model must be trained as a module.

    Args:
        model: stock model, dense or pruned before.
        keep: group name -> ascending indices of the channels kept; groups that are not named keep all.

    Raises:
        RecipeError: an unknown group, an empty, unsorted or out-of-range keep-list, different counts in parts of a block.
        NumericsError: see `families.check_prunable`.
    """
    groups = prunable(model)
    check_keep(groups, keep)
    removed: dict[tuple[str, bool], list[Tensor]] = {}  # (module, is input side) -> channels that go
    for group in groups:
        if group.name in keep:
            mask = torch.ones(group.width, dtype=torch.bool)
            mask[keep[group.name].cpu()] = False
            gone = mask.nonzero().flatten()
            for member in group.members:
                removed.setdefault((member.module, member.role == "in"), []).append(gone + member.offset)
    for name, module in list(model.named_modules()):
        out, inputs = removed.get((name, False)), removed.get((name, True))
        if out is not None or inputs is not None:
            keep_channels(module, _complement(out, module.weight, 0), _complement(inputs, module.weight, 1))
    families.refresh_attributes(model, families.family_of(model, "prune"))


def check_keep(groups: Iterable[Group], keep: Mapping[str, Tensor]) -> None:
    """Check keep-lists against the groups they are for.

    Raises:
        RecipeError: names the group and what is wrong with its list.
    """
    by_name = {group.name: group for group in groups}
    for name, index in keep.items():
        if name not in by_name:
            raise RecipeError(f"prune: no group {name!r} in this model; groups are {', '.join(by_name)}")
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
                f"prune: {first} keeps {expected} and {group.name} {count} channels; parts of a block need equal counts"
            )


def _traced(split: nn.Module) -> torch_pruning.DependencyGraph:
    with torch.enable_grad():  # DepGraph reads the autograd graph, whatever the caller is in
        return torch_pruning.DependencyGraph().build_dependency(
            split,
            blank_images(split, _TRACE_HW),
            forward_fn=detect.raw_outputs,  # decoding would mix the output channels into anchors
            unwrapped_parameters=[],
            customized_pruners={},
            ignored_layers=[],
            ignored_params=[],
            verbose=False,
        )


def _members(
    found: torch_pruning.Group, names: Mapping[nn.Module, str], graph: torch_pruning.DependencyGraph
) -> list[Member]:
    """Convolutions and BatchNorms of a DepGraph group, in the split view's names, one member per run of channels."""
    members = []
    width = len(found[0].idxs)
    for item in found.items:
        module = item.dep.target.module
        if not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            continue  # element-wise operations, concats: no tensors
        if isinstance(module, nn.BatchNorm2d):
            role: Literal["out", "in", "norm"] = "norm"
        else:
            role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        runs: dict[int, list[int]] = {}
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            runs.setdefault(index - root, []).append(root)
        for offset, roots in sorted(runs.items()):
            if sorted(roots) != list(range(width)):
                raise RecipeError(f"prune: {names[module]} shares only some channels of a group; not stock wiring")
            members.append(Member(names[module], role, offset))
    return members


def _group(name: str, width: int, members: Iterable[Member], parts: Mapping[str, Part]) -> Group:
    tie = parts[name].stock if name in parts else name
    stock = dict.fromkeys(_stock(member, parts) for member in members)  # all parts read the same input: one member
    return Group(name, width, tie, tuple(stock))


def _stock(member: Member, parts: Mapping[str, Part]) -> Member:
    """A member of the split view in the names of the stock model."""
    block, _, module = member.module.rpartition(".")
    if block not in parts:
        return member
    shift = parts[block].offset if member.role != "in" else 0
    return Member(f"{parts[block].stock}.{module}", member.role, member.offset + shift)


def _complement(removed: list[Tensor] | None, weight: Tensor, dim: int) -> Tensor | None:
    if removed is None:
        return None
    mask = torch.ones(weight.shape[dim], dtype=torch.bool)
    mask[torch.cat(removed)] = False
    return mask.nonzero().flatten()
