"""From importance to keep-lists: how many channels each group keeps so that the model costs what was asked for.

Cost is counted in multiply-accumulates of convolutions (MACs); GFLOPs are 2 x GMACs. It is a sum over convolutions of
`kernel area x output pixels x output channels x input channels`, so any assignment of widths is priced without surgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.graph import Group, Member
from yolo_compress.prune.shadow import blank_images, shadow

Scope = Literal["global", "local", "isomorphic"]

TOLERANCE = 0.02  # of the target; what the recipe promises


@dataclass(frozen=True)
class Plan:
    """What to keep, and what that costs.

    Attributes:
        keep: group name -> ascending channel indices, the argument of `graph.prune`.
        macs_before, macs_after: MACs of all convolutions for one image.
        widths: group name -> (channels before, channels after), in order of execution.
    """

    keep: dict[str, Tensor]
    macs_before: int
    macs_after: int
    widths: dict[str, tuple[int, int]]

    @property
    def kept_flops(self) -> float:
        """MACs after over MACs before."""
        return self.macs_after / self.macs_before


def conv_macs(model: nn.Module, imgsz_hw: tuple[int, int]) -> int:
    """MACs of all convolutions of `model` for one image of `imgsz_hw` pixels, DFL included; nothing is computed."""
    shapes = _conv_shapes(model, imgsz_hw)
    return sum(shape.area * shape.out_channels * shape.in_channels for shape in shapes.values())


def channel_macs(model: nn.Module, groups: Sequence[Group], imgsz_hw: tuple[int, int]) -> dict[str, int]:
    """Group name -> MACs of one image that go when one of its channels goes alone, in all members that write or read it."""
    shapes = _conv_shapes(model, imgsz_hw)

    def cost(member: Member) -> int:
        shape = shapes[member.module]
        return shape.area * (shape.in_channels if member.role == "out" else shape.out_channels)

    return {group.name: sum(cost(member) for member in group.members if member.role != "norm") for group in groups}


def parameters(model: nn.Module) -> int:
    """Numbers in the parameters of `model`, buffers excluded."""
    return sum(parameter.numel() for parameter in model.parameters())


def choose(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    keep_flops: float,
    round_to: int,
    imgsz_hw: tuple[int, int],
    floor: float = 0.1,
    scope: Scope = "global",
) -> Plan:
    """Keep-lists of the most important channels that cost `keep_flops` of the MACs, as close below as rounding allows.

    Channels leave in blocks of `min(round_to, group.unit)`, cheapest score first; when the budget is met, blocks that still fit
    come back, most important first. The k-th best channels of both C2f halves share one score, as they can only leave together.

    Args:
        model: stock model, not changed; `keep_flops` is relative to it as it stands.
        groups: `graph.prunable(model)`.
        scores: group name -> `importance_C`.
        keep_flops: share of the MACs to keep, in (0, 1).
        round_to: widths are multiples of this, a power of two, where the original width is.
        imgsz_hw: image size in pixels at which MACs are counted.
        floor: every group keeps at least this share of its channels, and at least one block.
        scope: which groups are ranked together; each such class is thinned alike. `global` all, `local` each alone,
            `isomorphic` those whose members have the same roles and kernels (Fang et al., arXiv 2407.04616).

    Raises:
        RecipeError: a setting out of range, or a budget that cannot be met within 2 %; names the nearest that can.
        NumericsError: a score is NaN or infinite; names the group.
    """
    _check_settings(keep_flops, round_to, floor, scope)
    ties = _ties(model, groups, scores, round_to, floor)
    price = _Price(_conv_shapes(model, imgsz_hw), groups, ties)
    full = np.array([tie.width for tie in ties])
    least = np.array([tie.least for tie in ties])
    before, smallest = price(full), price(least)
    target = keep_flops * before
    if smallest > target:
        raise RecipeError(
            f"prune: keep_flops={keep_flops} cannot be reached; the smallest is {_rounded_up(smallest / before)} with "
            f"prune.floor={floor} and prune.round_to={round_to}"
        )
    widths = _fill(_cut(_ranked(ties, scope), ties, price, target), ties, price, target)
    after = price(widths)
    if target - after > TOLERANCE * target:
        raise RecipeError(
            f"prune: keep_flops={keep_flops} cannot be met within 2 % in steps of prune.round_to={round_to}; "
            f"the nearest below is {_rounded_up(after / before)}; choose that or a smaller round_to"
        )
    kept = {name: int(width) for tie, width in zip(ties, widths, strict=True) for name in tie.names}
    return Plan(
        keep={group.name: _best(scores[group.name], kept[group.name]) for group in groups},
        macs_before=int(before),
        macs_after=int(after),
        widths={group.name: (group.width, kept[group.name]) for group in groups},
    )


def _rounded_up(share: float) -> float:
    """Three digits that, given as `keep_flops`, still admit `share`."""
    return ceil(1000 * share - 1e-9) / 1000


@dataclass(frozen=True)
class _ConvShape:
    area: int  # kernel height x width x output pixels / groups: MACs for one input and one output channel
    out_channels: int
    in_channels: int


@dataclass(frozen=True)
class _Tie:
    """Groups that share one width; `blocks[j]` is the score of the j-th block to go, ascending; alike in `shape`."""

    names: tuple[str, ...]
    shape: object
    width: int
    unit: int
    least: int
    blocks: tuple[float, ...]


class _Price:
    """MACs as a function of the widths of all ties."""

    def __init__(self, shapes: Mapping[str, _ConvShape], groups: Sequence[Group], ties: Sequence[_Tie]) -> None:
        rows = {name: row for row, name in enumerate(shapes)}
        columns = {name: column for column, tie in enumerate(ties) for name in tie.names}
        self._area = np.array([shape.area for shape in shapes.values()], dtype=np.int64)
        self._slots = {role: np.zeros((len(rows), len(ties)), dtype=np.int64) for role in ("out", "in")}
        for group in groups:
            for member in group.members:
                if member.role != "norm":
                    self._slots[member.role][rows[member.module], columns[group.name]] += 1
        full = np.array([tie.width for tie in ties], dtype=np.int64)
        channels = {
            "out": np.array([shape.out_channels for shape in shapes.values()], dtype=np.int64),
            "in": np.array([shape.in_channels for shape in shapes.values()], dtype=np.int64),
        }
        self._fixed = {role: channels[role] - self._slots[role] @ full for role in ("out", "in")}

    def __call__(self, widths: np.ndarray) -> int:
        out, inputs = (self._fixed[role] + self._slots[role] @ widths for role in ("out", "in"))
        return int((self._area * out * inputs).sum())


def _conv_shapes(model: nn.Module, imgsz_hw: tuple[int, int]) -> dict[str, _ConvShape]:
    shapes: dict[str, _ConvShape] = {}
    twin = shadow(model)

    def record(name: str, conv: nn.Conv2d, output_BCHW: Tensor) -> None:
        pixels = output_BCHW.shape[-2] * output_BCHW.shape[-1]
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        previous = shapes[name].area if name in shapes else 0  # a convolution that runs twice costs twice
        shapes[name] = _ConvShape(previous + kernel * pixels // conv.groups, conv.out_channels, conv.in_channels)

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, _, output, name=name: record(name, conv, output))
    with torch.no_grad():
        twin(blank_images(twin, imgsz_hw))
    return shapes


def _check_settings(keep_flops: float, round_to: int, floor: float, scope: str) -> None:
    if not 0 < keep_flops < 1:
        raise RecipeError(
            f"prune: keep_flops must lie between 0 and 1, both excluded, got {keep_flops}; 1 would prune nothing"
        )
    if round_to < 1 or round_to & (round_to - 1):
        raise RecipeError(f"prune: round_to must be a power of two, got {round_to}")
    if not 0 <= floor < 1:
        raise RecipeError(f"prune: floor must be at least 0 and less than 1, got {floor}")
    if scope not in get_args(Scope):
        raise RecipeError(f"prune: scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")


def _ties(
    model: nn.Module, groups: Sequence[Group], scores: Mapping[str, Tensor], round_to: int, floor: float
) -> list[_Tie]:
    tied: dict[str, list[Group]] = {}
    for group in groups:
        score_C = scores[group.name]
        if score_C.shape != (group.width,):
            raise RecipeError(
                f"prune: criterion gave {tuple(score_C.shape)} scores for {group.name}, expected ({group.width},)"
            )
        if not bool(torch.isfinite(score_C).all()):
            raise NumericsError(f"prune: importance of {group.name} is NaN or infinite")
        tied.setdefault(group.tie, []).append(group)
    ties = []
    for members in tied.values():
        width = members[0].width
        unit = min(round_to, members[0].unit)
        ascending = torch.stack([scores[group.name].double().cpu().sort().values for group in members]).mean(0)
        blocks = ascending.reshape(-1, unit).mean(1)
        least = max(1, ceil(floor * width / unit - 1e-9)) * unit
        ties.append(
            _Tie(
                tuple(group.name for group in members),
                _shape(model, members),
                width,
                unit,
                least,
                tuple(blocks.tolist()),
            )
        )
    return ties


def _shape(model: nn.Module, groups: Iterable[Group]) -> object:
    """What isomorphic ties have in common: the roles of their members and the kernels of the convolutions among them."""
    members = (member for group in groups for member in group.members)
    kernels = ((member.role, getattr(model.get_submodule(member.module), "kernel_size", None)) for member in members)
    return tuple(sorted(kernels, key=str))


def _ranked(ties: Sequence[_Tie], scope: Scope) -> list[int]:
    """Which tie loses a block at each step, until all are at their least. Equal scores are taken from all ties evenly."""
    classes: dict[object, list[tuple[float, float, int]]] = {}
    for index, tie in enumerate(ties):
        alike = {"global": None, "local": index, "isomorphic": tie.shape}[scope]
        blocks = [(block, (j + 1) / len(tie.blocks), index) for j, block in enumerate(tie.blocks)]
        classes.setdefault(alike, []).extend(blocks)
    steps = []
    for blocks in classes.values():
        for place, (score, _, index) in enumerate(sorted(blocks)):
            steps.append(((place + 1) / len(blocks), score, index))
    room = [(tie.width - tie.least) // tie.unit for tie in ties]
    ranking = []
    for _, _, index in sorted(steps):
        if room[index] > 0:
            room[index] -= 1
            ranking.append(index)
    return ranking


def _cut(ranking: Sequence[int], ties: Sequence[_Tie], price: _Price, target: float) -> np.ndarray:
    """Widths after the shortest start of `ranking` that meets the target; the price falls with every step, so bisect."""
    units = np.array([tie.unit for tie in ties])
    full = np.array([tie.width for tie in ties])

    def widths(steps: int) -> np.ndarray:
        return full - units * np.bincount(np.array(ranking[:steps], dtype=np.int64), minlength=len(ties))

    low, high = 0, len(ranking)
    while low < high:
        middle = (low + high) // 2
        if price(widths(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return widths(low)


def _fill(widths: np.ndarray, ties: Sequence[_Tie], price: _Price, target: float) -> np.ndarray:
    """Give back, best score first, blocks that still fit under the target."""
    widths = widths.copy()
    while True:
        fitting = []
        for index, tie in enumerate(ties):
            if widths[index] < tie.width:
                wider = widths.copy()
                wider[index] += tie.unit
                if price(wider) <= target:
                    fitting.append((tie.blocks[(tie.width - wider[index]) // tie.unit], -index))
        if not fitting:
            return widths
        index = -max(fitting)[1]
        widths[index] += ties[index].unit


def _best(score_C: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` best channels; of equal ones the first stay."""
    order = torch.sort(score_C.cpu(), descending=True, stable=True).indices
    return order[:count].sort().values
