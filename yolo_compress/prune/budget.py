"""From importance to keep-lists: how many channels each group keeps so that the model costs what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.prune.cost import ConvShape, Price, Widths, latency_price, macs_price, parameters_price
from yolo_compress.prune.graph import Group
from yolo_compress.runtime.measure.layer_times import LayerTable

Scope = Literal["global", "local", "isomorphic"]

TOLERANCE = 0.02  # of the target; what the recipe promises


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost.

    Attributes:
        knob: the knob that it comes from, for messages.
        price: what is counted.
        target: the most that the model may cost, in units of the price.
        unit: what one unit of the knob is worth in units of the price: the dense cost for a share, 1 for milliseconds.
    """

    knob: str
    price: Price
    target: float
    unit: float

    def of(self, cost: float) -> float:
        """A cost in units of the knob, rounded up to three digits: given as budget, it still admits the cost."""
        return ceil(1000 * cost / self.unit - 1e-9) / 1000


def keep_flops(shapes: Mapping[str, ConvShape], share: float) -> Budget:
    """MACs, as a share of those of the model that `shapes` are of."""
    return _share("keep_flops", shapes, macs_price, share)


def keep_params(shapes: Mapping[str, ConvShape], share: float) -> Budget:
    """Parameters, as a share of those of the model that `shapes` are of."""
    return _share("keep_params", shapes, parameters_price, share)


def latency_ms(shapes: Mapping[str, ConvShape], table: LayerTable, limit: float) -> Budget:
    """Milliseconds by `cost.latency_price`."""
    dense = float(table["whole_ms"])
    if not 0 < limit < dense:
        raise RecipeError(f"prune: latency_ms={limit:g} asks for nothing: the network as it is takes {dense:.3g} ms")
    return Budget("latency_ms", latency_price(shapes, table), limit, 1.0)


def _share(
    knob: str, shapes: Mapping[str, ConvShape], price: Callable[[Mapping[str, ConvShape]], Price], share: float
) -> Budget:
    if not 0 < share < 1:
        raise RecipeError(f"prune: {knob} must lie between 0 and 1, both excluded, got {share}; 1 would prune nothing")
    own = price(shapes)
    dense = own(*(np.array([getattr(s, f"{side}_channels") for s in shapes.values()]) for side in ("out", "in")))
    return Budget(knob, own, share * dense, dense)


@dataclass(frozen=True)
class Plan:
    """What to keep, and what that costs.

    Attributes:
        keep: group name -> ascending channel indices, the argument of `graph.prune`.
        widths: group name -> (channels before, channels after), in order of execution.
        macs: convolution -> (MACs before, MACs after) for one image.
        parameters_before, parameters_after: of convolutions and BatchNorms.
        cost: by the budget's price.
    """

    keep: dict[str, Tensor]
    widths: dict[str, tuple[int, int]]
    macs: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int
    cost: float

    @property
    def macs_before(self) -> int:
        """MACs of all convolutions of the model as it stands."""
        return sum(before for before, _ in self.macs.values())

    @property
    def macs_after(self) -> int:
        """MACs of all convolutions that stay."""
        return sum(after for _, after in self.macs.values())

    @property
    def kept_flops(self) -> float:
        """MACs after over MACs before."""
        return self.macs_after / self.macs_before


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
    """Keep-lists of the most important channels that cost what the budget allows, as close below as rounding lets them.

    Channels leave in blocks of `min(round_to, group.unit)`, cheapest score first; when the budget is met, blocks that still fit
    come back, most important first. The k-th best channels of both C2f halves share one score, as they can only leave together.

    Args:
        model: stock model, not changed.
        groups: `graph.prunable(model)`.
        scores: group name -> `importance_C`.
        budget: what the result may cost.
        round_to: widths are multiples of this, a power of two, where the original width is.
        shapes: `cost.conv_shapes` of the model as it stands.
        floor: every group keeps at least this share of its channels, and at least one block.
        scope: which groups are ranked together; each such class is thinned alike. `global` all, `local` each alone,
            `isomorphic` those whose members have the same roles and kernels (Fang et al., arXiv 2407.04616).
        least: group name -> channels that it keeps at least, beside `floor`: what sensitivity found, or the floor of
            the net that rounds of pruning started from.

    Raises:
        RecipeError: a setting out of range, or a budget that cannot be met within 2 %; names the nearest that can.
        NumericsError: a score is NaN or infinite; names the group.
    """
    _check_settings(round_to, floor, scope)
    ties = _ties(model, groups, scores, round_to, floor, least or {})
    full = np.array([tie.width for tie in ties])
    layout = Widths(shapes, _members(groups, ties), list(full))

    def price(widths: np.ndarray) -> float:
        return budget.price(*layout.channels(widths))

    _check_reachable(ties, price, budget, round_to, floor)
    widths = _fill(_cut(_ranked(ties, scope), ties, price, budget.target), ties, price, budget.target)
    cost = price(widths)
    if budget.target - cost > TOLERANCE * budget.target:
        raise RecipeError(
            f"prune: {budget.knob}={budget.target / budget.unit:.4g} cannot be met within 2 % in steps of "
            f"prune.round_to={round_to}; the nearest below is {budget.of(cost)}; choose that or a smaller round_to"
        )
    kept = {name: int(width) for tie, width in zip(ties, widths, strict=True) for name in tie.names}
    before, after = layout.channels(full), layout.channels(widths)
    count = parameters_price(shapes)
    return Plan(
        keep={group.name: _best(scores[group.name], kept[group.name]) for group in groups},
        widths={group.name: (group.width, kept[group.name]) for group in groups},
        macs=dict(zip(shapes, zip(_macs(shapes, before), _macs(shapes, after), strict=True), strict=True)),
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
    """Refuse a budget that `choose` would refuse whatever the scores are, with the same arguments.

    Raises:
        RecipeError: A setting out of range, or a budget that cannot be reached; says the smallest.
    """
    _check_settings(round_to, floor, "global")
    ties = _ties(model, groups, {group.name: torch.zeros(group.width) for group in groups}, round_to, floor, least)
    layout = Widths(shapes, _members(groups, ties), [tie.width for tie in ties])
    _check_reachable(ties, lambda widths: budget.price(*layout.channels(widths)), budget, round_to, floor)


def _check_reachable(
    ties: Sequence[_Tie], price: Callable[[np.ndarray], float], budget: Budget, round_to: int, floor: float
) -> None:
    smallest = price(np.array([tie.least for tie in ties]))
    if smallest > budget.target:
        raise RecipeError(
            f"prune: {budget.knob}={budget.target / budget.unit:.4g} cannot be reached; the smallest is "
            f"{budget.of(smallest)} with prune.floor={floor}, prune.round_to={round_to} and the caps of prune.sensitivity, if any"
        )


def _macs(shapes: Mapping[str, ConvShape], channels: tuple[np.ndarray, np.ndarray]) -> list[int]:
    area_N = np.array([shape.area for shape in shapes.values()], dtype=np.int64)
    return (area_N * channels[0] * channels[1]).tolist()


def _members(groups: Sequence[Group], ties: Sequence[_Tie]) -> list[list[tuple[str, str]]]:
    """For each tie, the slices of convolutions that have its width."""
    by_name = {group.name: group for group in groups}
    return [
        [
            (member.module, member.role)
            for name in tie.names
            for member in by_name[name].members
            if member.role != "norm"
        ]
        for tie in ties
    ]


@dataclass(frozen=True)
class _Tie:
    """Groups that share one width; `blocks[j]` is the score of the j-th block to go, ascending; alike in `shape`."""

    names: tuple[str, ...]
    shape: object
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
        if not isinstance(score_C, Tensor) or score_C.shape != (group.width,):  # of a user's own criterion
            got = tuple(score_C.shape) if isinstance(score_C, Tensor) else type(score_C).__name__
            raise RecipeError(f"prune: criterion gave {got} scores for {group.name}, expected ({group.width},)")
        if not bool(torch.isfinite(score_C).all()):
            raise NumericsError(f"prune: importance of {group.name} is NaN or infinite")
        tied.setdefault(group.tie, []).append(group)
    ties = []
    for members in tied.values():
        width = members[0].width
        unit = min(round_to, members[0].unit)
        ascending = torch.stack([scores[group.name].double().cpu().sort().values for group in members]).mean(0)
        blocks = ascending.reshape(-1, unit).mean(1)
        kept = max(floor * width, *(least.get(group.name, 1) for group in members))
        blocks_kept = max(1, ceil(min(kept, width) / unit - 1e-9))
        ties.append(
            _Tie(
                tuple(group.name for group in members),
                _shape(model, members),
                width,
                unit,
                blocks_kept * unit,
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


_Cost = Callable[[np.ndarray], float]  # of the widths of all ties


def _cut(ranking: Sequence[int], ties: Sequence[_Tie], price: _Cost, target: float) -> np.ndarray:
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


def _fill(widths: np.ndarray, ties: Sequence[_Tie], price: _Cost, target: float) -> np.ndarray:
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
