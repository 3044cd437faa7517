"""Choose the channels of a pruned model: as many of the most important channels as a budget allows.

In this file a tie is a set of channel groups that must lose equal shares of their channels, such as the two halves of a C2f block.
Widths of a tie are counted in steps: a step is `Group.step` channels of each of its groups.
A price is a function that computes the cost of a model: MACs, parameters or ms (`cost.Price`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.cost import (
    ConvShape,
    MacSums,
    Price,
    Widths,
    check_table,
    full_channels,
    latency_price,
    macs_price,
    parameters_price,
)
from yolo_compress.prune.graph import Group
from yolo_compress.runtime.measure.layer_times import LayerTable

Scope = Literal["global", "local", "isomorphic"]

TOLERANCE = 0.02  # allowed deviation from the target cost, relative; documented in the recipe


@dataclass(frozen=True)
class Budget:
    """Limit for the cost of the pruned model, in MACs, parameters or ms.

    Attributes:
        knob: name of the setting in the recipe, for messages.
        price: function that takes the `conv_shapes` of a model and returns the price function of this model.
        target: largest cost that is allowed, in the unit that `price` returns.
        unit: cost that corresponds to a knob value of 1. If the knob is a share, this is the cost of the unpruned model. If the
            knob is in milliseconds, this is 1.
    """

    knob: str
    price: Callable[[Mapping[str, ConvShape]], Price]
    target: float
    unit: float

    def cost(self, shapes: Mapping[str, ConvShape]) -> float:
        """Return the cost of the model with these shapes."""
        return self.price(shapes)(*full_channels(shapes))

    def of(self, cost: float) -> float:
        """Convert a cost to a value of the knob, rounded up to three decimals. A budget of this value allows the cost."""
        return ceil(1000 * cost / self.unit - 1e-9) / 1000


def keep_flops(shapes: Mapping[str, ConvShape], share: float) -> Budget:
    """Return a budget that limits the MACs to `share` times the MACs of the model with these `shapes`."""
    return _share("keep_flops", shapes, macs_price, share)


def keep_params(shapes: Mapping[str, ConvShape], share: float) -> Budget:
    """Return a budget that limits the parameters to `share` times the parameters of the model with these `shapes`."""
    return _share("keep_params", shapes, parameters_price, share)


def latency_ms(shapes: Mapping[str, ConvShape], table: LayerTable, limit: float) -> Budget:
    """Return a budget that limits the latency to `limit` ms, as estimated by `cost.latency_price`.

    Raises:
        RecipeError: The unpruned model already meets the limit, or the table belongs to another model.
    """
    check_table(shapes, table)
    unpruned = float(table["whole_ms"])
    if not 0 < limit < unpruned:
        raise RecipeError(
            f"prune: latency_ms={limit:g} is already met: the unpruned model takes {unpruned:.3g} ms; set a smaller limit"
        )
    return Budget("latency_ms", partial(latency_price, table=table), limit, 1.0)


def _share(
    knob: str, shapes: Mapping[str, ConvShape], price: Callable[[Mapping[str, ConvShape]], Price], share: float
) -> Budget:
    if not 0 < share < 1:
        raise RecipeError(f"prune: {knob} must lie between 0 and 1, both excluded, got {share}; 1 would prune nothing")
    unpruned = price(shapes)(*full_channels(shapes))
    return Budget(knob, price, share * unpruned, unpruned)


@dataclass(frozen=True)
class Plan(MacSums):
    """Channels to keep, and the cost of the pruned model.

    Attributes:
        keep: group name -> indices of the channels to keep, ascending. This is the argument of `graph.prune`.
        widths: group name -> (channels before, channels after), in order of execution.
        macs: convolution -> (MACs before, MACs after) for one image.
        parameters_before, parameters_after: parameters of convolutions and BatchNorms.
        cost: cost of the pruned model in the unit of the budget: MACs, parameters or ms.
        bottlenecks: layer -> (bottlenecks before, bottlenecks after), for each layer that can lose some. Empty if none may go.
            Removed groups are in `widths`, but not in `keep`, with 0 channels after. Removed convolutions have 0 MACs after.
    """

    keep: dict[str, Tensor]
    widths: dict[str, tuple[int, int]]
    macs: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int
    cost: float
    bottlenecks: dict[str, tuple[int, int]] = field(default_factory=dict)


def choose(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    budget: Budget,
    round_to: int,
    shapes: Mapping[str, ConvShape],
    floor: float = 0.1,
    scope: Scope = "global",
    least: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the most important channels so that the cost of the model is as close below the budget as rounding allows.

    Channels are removed in blocks of `min(round_to, group.unit)`, lowest importance first. Once the budget is met, blocks that
    still fit are restored, highest importance first. The two halves of a C2f block must keep equal numbers of channels. The k-th
    most important channels of both halves therefore share one score. So do those of other groups with the same `tie`.

    Args:
        model: Stock model. It is not changed.
        groups: `graph.prunable(model)`.
        scores: Group name -> `importance_C`.
        budget: Limit for the cost of the pruned model.
        round_to: A power of two. If the width of a group is a multiple of `round_to`, the new width is a multiple too.
        shapes: `cost.conv_shapes` of the model.
        floor: Minimum share of its channels that every group keeps. At least one block of each group stays.
        scope: Which channel groups are ranked together. `global` ranks all groups together and `local` ranks each group alone.
            `isomorphic` ranks together the groups whose members have the same roles and kernel sizes (Fang et al., arXiv
            2407.04616). Groups that are ranked together form a set. Each set loses the same share of its channels.
        least: Group name -> minimum number of channels, in addition to `floor`. The sensitivity analysis computes these
            numbers, or they follow from the model before the first round of pruning.

    Raises:
        RecipeError: A setting is out of range, or the budget cannot be met within 2 %.
        NumericsError: A score is NaN or infinite.
    """
    _check_settings(round_to, floor, scope)
    ties = _ties(model, groups, scores, round_to, floor, least or {})
    full_widths = np.array([tie.width for tie in ties])
    layout = Widths(shapes, _convolution_slices(groups, ties), full_widths)

    priced = budget.price(shapes)

    def price(widths: np.ndarray) -> float:
        return priced(*layout.channels(widths))

    _check_reachable(ties, price, budget, round_to, floor)
    widths = _restore_fitting(
        _remove_until_met(_removal_order(ties, scope), ties, price, budget.target), ties, price, budget.target
    )
    cost = price(widths)
    if budget.target - cost > TOLERANCE * budget.target:
        raise RecipeError(
            f"prune: {budget.knob}={budget.target / budget.unit:.4g} cannot be met within 2 % in steps of "
            f"prune.round_to={round_to}; the nearest below is {budget.of(cost)}; set that value or a smaller round_to"
        )
    steps = {name: int(width) for tie, width in zip(ties, widths, strict=True) for name in tie.names}
    kept = {group.name: group.step * steps[group.name] for group in groups}
    before, after = layout.channels(full_widths), layout.channels(widths)
    count = parameters_price(shapes)
    return Plan(
        keep={group.name: _top_channels(scores[group.name], kept[group.name]) for group in groups},
        widths={group.name: (group.width, kept[group.name]) for group in groups},
        macs=dict(
            zip(shapes, zip(_macs_per_conv(shapes, before), _macs_per_conv(shapes, after), strict=True), strict=True)
        ),
        parameters_before=int(count(*before)),
        parameters_after=int(count(*after)),
        cost=cost,
    )


def check_reachable(
    model: nn.Module,
    groups: Sequence[Group],
    budget: Budget,
    round_to: int,
    shapes: Mapping[str, ConvShape],
    floor: float,
    least: Mapping[str, int],
) -> None:
    """Check that `choose` can reach the budget with these arguments. No importance scores are needed.

    Raises:
        RecipeError: A setting is out of range, or the budget is too small. The message states the smallest possible budget.
    """
    _check_settings(round_to, floor, "global")
    ties = _ties(model, groups, {group.name: torch.zeros(group.width) for group in groups}, round_to, floor, least)
    layout = Widths(shapes, _convolution_slices(groups, ties), np.array([tie.width for tie in ties]))
    price = budget.price(shapes)
    _check_reachable(ties, lambda widths: price(*layout.channels(widths)), budget, round_to, floor)


class Unreachable(RecipeError):
    """No widths meet a budget: it is below the cost of the narrowest model that the recipe allows."""


def _check_reachable(
    ties: Sequence[_Tie], price: Callable[[np.ndarray], float], budget: Budget, round_to: int, floor: float
) -> None:
    smallest = price(np.array([tie.least for tie in ties]))
    if smallest > budget.target:
        raise Unreachable(
            f"prune: {budget.knob}={budget.target / budget.unit:.4g} cannot be reached; the smallest is "
            f"{budget.of(smallest)} with prune.floor={floor}, prune.round_to={round_to} and the caps of prune.sensitivity, if any"
        )


def _macs_per_conv(shapes: Mapping[str, ConvShape], channels: tuple[np.ndarray, np.ndarray]) -> list[int]:
    area_N = np.array([structure.area for structure in shapes.values()], dtype=np.int64)
    return (area_N * channels[0] * channels[1]).tolist()


def _convolution_slices(groups: Sequence[Group], ties: Sequence[_Tie]) -> list[list[tuple[str, str, int]]]:
    """Return, for each tie, the convolutions of its groups, each with its role and with its channels in a step.

    The role is "out" if the tie sets the output channels of the convolution, "in" if it sets its input channels.
    """
    by_name = {group.name: group for group in groups}
    return [
        [
            (member.module, member.role, by_name[name].step)
            for name in tie.names
            for member in by_name[name].members
            if member.role != "norm"
        ]
        for tie in ties
    ]


@dataclass(frozen=True)
class _Tie:
    """A set of channel groups that must lose equal shares of their channels, such as the two halves of a C2f block.

    Attributes:
        names: names of the groups.
        structure: key that is equal for ties with the same roles and kernel sizes, see `_structure`.
        width: number of steps of each group before pruning.
        unit: number of steps per block; a block is removed as a whole.
        least: minimum number of steps that each group keeps.
        blocks: importance of each block, ascending. The first blocks are removed first.
    """

    names: tuple[str, ...]
    structure: object
    width: int
    unit: int
    least: int
    blocks: tuple[float, ...]


def _check_settings(round_to: int, floor: float, scope: str) -> None:
    if round_to < 1 or round_to & (round_to - 1):
        raise RecipeError(f"prune: round_to must be a power of two, got {round_to}")
    if not 0 <= floor < 1:
        raise RecipeError(f"prune: floor must be at least 0 and less than 1, got {floor}")
    if scope not in get_args(Scope):
        raise RecipeError(f"prune: scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")


def _ties(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    round_to: int,
    floor: float,
    least: Mapping[str, int],
) -> list[_Tie]:
    tied: dict[str, list[Group]] = {}
    for group in groups:
        score_C = scores[group.name]
        if not isinstance(score_C, Tensor) or score_C.shape != (group.width,):  # possible with a user's own criterion
            got = tuple(score_C.shape) if isinstance(score_C, Tensor) else type(score_C).__name__
            raise RecipeError(
                f"prune.criterion: the criterion returns {got} scores for {group.name}, expected ({group.width},)"
            )
        if not bool(torch.isfinite(score_C).all()):
            raise NumericsError(
                f"prune: importance of {group.name} is NaN or infinite; check the criterion and the model"
            )
        tied.setdefault(group.tie, []).append(group)
    ties = []
    for members in tied.values():
        width = members[0].steps
        unit = min(round_to, members[0].unit)
        ascending = [scores[group.name].double().cpu().sort().values.view(width, -1).mean(1) for group in members]
        blocks = torch.stack(ascending).mean(0).reshape(-1, unit).mean(1)
        kept = max(floor * width, *(least.get(group.name, 1) / group.step for group in members))
        blocks_kept = max(1, ceil(min(kept, width) / unit - 1e-9))
        ties.append(
            _Tie(
                tuple(group.name for group in members),
                _structure(model, members),
                width,
                unit,
                blocks_kept * unit,
                tuple(blocks.tolist()),
            )
        )
    return ties


def _structure(model: nn.Module, groups: Iterable[Group]) -> object:
    """Return a key made of the roles of all members and the kernel sizes of their convolutions. Isomorphic ties have equal keys."""
    members = (member for group in groups for member in group.members)
    kernels = ((member.role, getattr(model.get_submodule(member.module), "kernel_size", None)) for member in members)
    return tuple(sorted(kernels, key=str))


def _removal_order(ties: Sequence[_Tie], scope: Scope) -> list[int]:
    """Return the order of removal: for each step, the index of the tie that loses a block.

    The order ends when all ties have their minimum width. If all scores are equal, all ties lose blocks evenly.
    """
    classes: dict[object, list[tuple[float, float, int]]] = {}
    for index, tie in enumerate(ties):
        rank_class = {"global": None, "local": index, "isomorphic": tie.structure}[scope]
        blocks = [(block, (j + 1) / len(tie.blocks), index) for j, block in enumerate(tie.blocks)]
        classes.setdefault(rank_class, []).extend(blocks)
    steps = []
    for blocks in classes.values():
        for place, (score, _, index) in enumerate(sorted(blocks)):
            steps.append(((place + 1) / len(blocks), score, index))
    room = [(tie.width - tie.least) // tie.unit for tie in ties]
    order = []
    for _, _, index in sorted(steps):
        if room[index] > 0:
            room[index] -= 1
            order.append(index)
    return order


_Cost = Callable[[np.ndarray], float]  # widths of all ties -> cost of the model


def _remove_until_met(order: Sequence[int], ties: Sequence[_Tie], price: _Cost, target: float) -> np.ndarray:
    """Return the widths of all ties after the fewest removal steps for which the cost is at most `target`.

    The cost decreases with every step, so the number of steps is found by bisection.
    """
    units = np.array([tie.unit for tie in ties])
    full_widths = np.array([tie.width for tie in ties])

    def widths(steps: int) -> np.ndarray:
        return full_widths - units * np.bincount(np.array(order[:steps], dtype=np.int64), minlength=len(ties))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if price(widths(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return widths(low)


def _restore_fitting(widths: np.ndarray, ties: Sequence[_Tie], price: _Cost, target: float) -> np.ndarray:
    """Return `widths` plus the removed blocks that fit without exceeding the cost `target`, highest importance first."""
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


def _top_channels(score_C: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` most important channels, ascending. Of channels with equal scores, the first are kept."""
    order = torch.sort(score_C.cpu(), descending=True, stable=True).indices
    return order[:count].sort().values
