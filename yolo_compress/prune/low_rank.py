"""Choose which convolutions of a model are factorised, in which scheme and to which ranks, and replace them.

A block is factorised independently of the others, since its input and output keep their channels. So the cost of the model is a sum
over the blocks, and so is the output error, relative to the variance of each block's output. Of the candidates of a block, those on
the lower convex hull of cost and error are taken in the order of error per saving, over all blocks, until the budget is met. Then
what still fits is given back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets.eval_mode import evaluating
from yolo_compress.nets.factors import POINTWISE, SCHEMES, Scheme, can_factorise, chain_of, replace_block
from yolo_compress.nets.families import check_prunable, refresh_attributes
from yolo_compress.nets.flow import Flow
from yolo_compress.nets.meta_copy import blank_images, shadow
from yolo_compress.prune.budget import TOLERANCE, Budget
from yolo_compress.prune.cost import ConvShape, MacSums, conv_ms, full_channels, parameters_price
from yolo_compress.prune.factorise import Factoriser, InputStatistics, Ranks, input_statistics, refit_last
from yolo_compress.runtime.measure.layer_times import LayerTable

ConvPrice = Callable[[str, ConvShape], float]  # (convolution, its shape) -> its part of the cost of the model
SHARES = (1.0, 0.5, 0.25)  # ranks that a latency table is measured at, as shares of `full_ranks`


@dataclass(frozen=True)
class Place:
    """A Conv block that can be factorised, and the pixels that its convolutions compute.

    Attributes:
        block: name of the block.
        kernel: side of its kernel.
        in_hw, out_hw: height and width of its input and output, px.
        shape: its convolution.
    """

    block: str
    kernel: int
    in_hw: tuple[int, int]
    out_hw: tuple[int, int]
    shape: ConvShape

    @property
    def conv(self) -> str:
        """Name of its convolution."""
        return f"{self.block}.conv"

    def schemes(self) -> tuple[Scheme, ...]:
        """Return the schemes that apply. A 1 x 1 convolution has no kernel to split."""
        return POINTWISE if self.kernel == 1 else SCHEMES

    def full_ranks(self, scheme: Scheme) -> Ranks:
        """Return the largest ranks that a latency table needs. Beyond them, the factors have more MACs than the block."""
        k, out, inputs = self.kernel, self.shape.out_channels, self.shape.in_channels
        if scheme == "mix":
            return (min(out, inputs * k * k),)
        if scheme == "reduce":
            return (min(inputs, out * k * k),)
        if scheme == "spatial":
            return (max(1, k * out * inputs // (out + inputs)),)
        return (inputs, out)

    def factors(self, scheme: Scheme, ranks: Ranks) -> dict[str, ConvShape]:
        """Return name -> shape of the convolutions of this scheme with these ranks."""
        k, out, inputs = self.kernel, self.shape.out_channels, self.shape.in_channels
        (in_h, in_w), (out_h, out_w) = self.in_hw, self.out_hw
        if scheme == "mix":
            parts = [(k * k, out_h * out_w, inputs, ranks[0]), (1, out_h * out_w, ranks[0], out)]
        elif scheme == "reduce":
            parts = [(1, in_h * in_w, inputs, ranks[0]), (k * k, out_h * out_w, ranks[0], out)]
        elif scheme == "spatial":
            parts = [(k, out_h * in_w, inputs, ranks[0]), (k, out_h * out_w, ranks[0], out)]
        else:
            first, second = ranks
            parts = [
                (1, in_h * in_w, inputs, first),
                (k * k, out_h * out_w, first, second),
                (1, out_h * out_w, second, out),
            ]
        return {
            f"{self.block}.{scheme}{index}.conv": ConvShape(kernel * pixels, kernel, 2, made, read)
            for index, (kernel, pixels, read, made) in enumerate(parts)
        }


def places(model: nn.Module, imgsz_hw: tuple[int, int], shapes: Mapping[str, ConvShape]) -> dict[str, Place]:
    """Return name -> place of every block that can be factorised.

    These are the Conv blocks of inference with one group and a square kernel. Depthwise convolutions and the output convolutions of
    the head stay whole.

    Args:
        model: Stock model. It is not changed.
        imgsz_hw: Height and width of the input, px.
        shapes: `cost.conv_shapes` of the model.

    Raises:
        RecipeError, NumericsError: See `families.check_prunable`. A model that is factorised already is refused.
    """
    flow: Flow = check_prunable(model)
    copied = shadow(model)
    sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

    def record(name: str, x_BCHW: Tensor, y_BCHW: Tensor) -> None:
        sizes[name] = (x_BCHW.shape[2], x_BCHW.shape[3]), (y_BCHW.shape[2], y_BCHW.shape[3])

    found = [name for name, block in copied.named_modules() if can_factorise(block) and f"{name}.conv" in flow.reads]
    for name in found:
        copied.get_submodule(f"{name}.conv").register_forward_hook(
            lambda _, inputs, output, name=name: record(name, inputs[0], output)
        )
    with torch.no_grad():
        copied(blank_images(copied, imgsz_hw))
    return {
        name: Place(name, int(model.get_submodule(f"{name}.conv").kernel_size[0]), *sizes[name], shapes[f"{name}.conv"])  # type: ignore[index]
        for name in found
    }


@dataclass(frozen=True)
class Candidate:
    """One way to factorise a block, or the whole block.

    Attributes:
        scheme: scheme of the factors; None: the block stays whole.
        ranks: channels between the factors.
        cost: cost of its convolutions, in the unit of the budget.
        error: squared output error, relative to the variance of the block's output.
    """

    scheme: Scheme | None
    ranks: Ranks
    cost: float
    error: float


@dataclass(frozen=True)
class LowRankPlan(MacSums):
    """Which blocks are factorised, and the cost of the model.

    Attributes:
        chosen: block -> its candidate, for the blocks that are factorised.
        macs: convolution of the model before -> (MACs before, MACs after) of one image. After: of all its factors.
        parameters_before, parameters_after: parameters of convolutions and BatchNorms.
        cost: cost of the factorised model in the unit of the budget: MACs, parameters or ms.
        error: sum of the output errors of all blocks.
    """

    chosen: dict[str, Candidate]
    macs: dict[str, tuple[int, int]]
    parameters_before: int
    parameters_after: int
    cost: float
    error: float


@dataclass(frozen=True)
class FactorTimes:
    """A table of layer times with those of factors, and the latency of the whole model divided by the sum of its layers' times."""

    table: LayerTable
    scale: float

    def ms(self, name: str, shape: ConvShape) -> float:
        """Return the time of a convolution or of a factor, interpolated in its MACs."""
        return self.scale * conv_ms(self.table, name, shape.macs)

    def check(self, of: Mapping[str, Place]) -> None:
        """Check that the table has the times of the factors of every block.

        Raises:
            RecipeError: It was measured for channels alone, or for another model.
        """
        for place in of.values():
            for scheme in place.schemes():
                for name in place.factors(scheme, place.full_ranks(scheme)):
                    if name not in self.table["layers"]:
                        raise RecipeError(
                            f"prune.latency_table: the table has no layer {name}: write the models again with `yolo-compress "
                            "probe` and this recipe, and measure them again"
                        )


def conv_price(knob: str, times: FactorTimes | None = None) -> ConvPrice:
    """Return the function that gives a convolution its part of the cost: MACs, parameters, or ms by the table of layer times.

    Args:
        knob: Name of the budget: "keep_flops", "keep_params" or "latency_ms".
        times: For "latency_ms".
    """
    if knob == "keep_flops":
        return lambda name, shape: shape.macs
    if knob == "keep_params":
        return lambda name, shape: shape.parameters
    assert times is not None
    return times.ms


def grid(limit: int, least: int, step: int) -> range:
    """Return the ranks that are tried: multiples of `step` from `least` on, below `limit`."""
    return range(max(1, ceil(least / step)) * step, limit, step)


def candidates(
    place: Place, price: ConvPrice, round_to: int, floor: float, factoriser: Factoriser | None = None
) -> list[Candidate]:
    """Return the whole block, and each way to factorise it that costs less. Dearest first, each with more error than the one before.

    Args:
        place: The block.
        price: Part of the cost of a convolution.
        round_to: Ranks are multiples of this number.
        floor: Smallest rank, as a share of the narrower side of the block.
        factoriser: Gives the errors. None: all errors are 0, to find out what is possible.
    """
    whole = Candidate(None, (), price(place.conv, place.shape), 0.0)
    found = [whole]
    least = ceil(floor * min(place.shape.in_channels, place.shape.out_channels))
    for scheme in place.schemes():
        errors = factoriser.errors(scheme).numpy() if factoriser else None
        full = place.full_ranks(scheme)
        tried: Iterable[Ranks] = ((rank,) for rank in grid(full[0], least, round_to))
        if scheme == "tucker":  # a rank that is not reduced leaves the convolution of that side without a purpose
            tried = (
                (first, second) for first in grid(full[0], least, round_to) for second in grid(full[1], least, round_to)
            )
        for ranks in tried:
            cost = sum(price(name, shape) for name, shape in place.factors(scheme, ranks).items())
            if cost < whole.cost:
                found.append(Candidate(scheme, ranks, cost, float(errors[ranks]) if errors is not None else 0.0))
    return _undominated(found)


def _undominated(ways: Sequence[Candidate]) -> list[Candidate]:
    """Return the ways to which no cheaper one has less error, dearest first."""
    kept: list[Candidate] = []
    for way in sorted(ways, key=lambda way: (way.cost, way.error)):
        if not kept or way.error < kept[-1].error:
            kept.append(way)
    whole = next(way for way in ways if way.scheme is None)
    return [whole, *(way for way in reversed(kept) if way.scheme)]


def choose(
    model_cost: float, limit: Budget, options: Mapping[str, Sequence[Candidate]], round_to: int
) -> dict[str, Candidate]:
    """Return block -> candidate, so that the cost of the model is as close below the budget as the ranks allow.

    Args:
        model_cost: Cost of the model with all blocks whole.
        limit: Budget.
        options: Block -> its candidates. The first one is the whole block.
        round_to: For the message.

    Raises:
        RecipeError: The budget cannot be met within 2 %, or the model already meets it.
    """
    if model_cost <= limit.target:
        raise RecipeError(
            f"prune: {limit.knob}={limit.target / limit.unit:.4g} is met before any convolution is factorised; with "
            "prune.then=low_rank, raise prune.then_share"
        )
    check_reachable(model_cost, limit, options, round_to)
    steps = []  # (error per saving, block, candidate); by block, the slopes rise
    for block, ways in options.items():
        hull = _hull(ways)
        for cheaper, dearer in zip(hull[1:], hull, strict=False):
            steps.append(((cheaper.error - dearer.error) / (dearer.cost - cheaper.cost), block, cheaper))
    chosen = {block: ways[0] for block, ways in options.items()}
    cost = model_cost
    for _, block, candidate in sorted(steps, key=lambda step: step[0]):
        if cost <= limit.target:
            break
        cost += candidate.cost - chosen[block].cost
        chosen[block] = candidate
    chosen, cost = _give_back(chosen, cost, limit.target, options)
    if limit.target - cost > TOLERANCE * limit.target:
        raise RecipeError(
            f"prune: {limit.knob}={limit.target / limit.unit:.4g} cannot be met within 2 % in steps of "
            f"prune.round_to={round_to}; the nearest below is {limit.of(cost)}; set that value or a smaller round_to"
        )
    return chosen


def check_reachable(
    model_cost: float, limit: Budget, options: Mapping[str, Sequence[Candidate]], round_to: int
) -> None:
    """Check that some ranks meet the budget.

    Raises:
        RecipeError: No block has a candidate that costs less than the whole block, or all of them together cost too much.
    """
    if all(len(ways) == 1 for ways in options.values()):
        cheaper = "is faster than the whole one" if limit.knob == "latency_ms" else "costs less than the whole one"
        raise RecipeError(
            f"prune: no factorised convolution of this model {cheaper} with ranks in steps of prune.round_to={round_to}; set a "
            "smaller prune.round_to, or prune.kind=channel"
        )
    smallest = model_cost - sum(ways[0].cost - min(way.cost for way in ways) for ways in options.values())
    if smallest > limit.target:
        raise RecipeError(
            f"prune: {limit.knob}={limit.target / limit.unit:.4g} cannot be reached by low rank; the smallest is "
            f"{limit.of(smallest)} with prune.floor and prune.round_to={round_to}; set a larger budget, or prune.kind=channel with "
            "prune.then=low_rank"
        )


def _hull(ways: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates on the lower convex hull of cost and error. They are sorted as those of `candidates`."""
    hull: list[Candidate] = []
    for way in ways:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], way):
            hull.pop()
        hull.append(way)
    return hull


def _slope(dearer: Candidate, cheaper: Candidate) -> float:
    return (cheaper.error - dearer.error) / (dearer.cost - cheaper.cost)


def _give_back(
    chosen: Mapping[str, Candidate], cost: float, target: float, options: Mapping[str, Sequence[Candidate]]
) -> tuple[dict[str, Candidate], float]:
    """Replace candidates by dearer ones with less error, as long as they fit. The largest gain comes first."""
    chosen = dict(chosen)
    while True:
        fitting = [
            (chosen[block].error - way.error, block, way)
            for block, ways in options.items()
            for way in ways
            if way.error < chosen[block].error and cost + way.cost - chosen[block].cost <= target
        ]
        if not fitting:
            return chosen, cost
        _, block, way = max(fitting, key=lambda row: row[0])
        cost += way.cost - chosen[block].cost
        chosen[block] = way


class LowRank:
    """Plans and makes the factorised versions of one model.

    Args:
        model: Stock model. It is not changed.
        shapes: `cost.conv_shapes` of the model.
        imgsz_hw: Height and width of the input, px.
        round_to: Ranks are multiples of this number.
        floor: Smallest rank, as a share of the narrower side of a block.
        images: Function that returns batches of calibration images.
        times: Times of layers and factors, for a budget in ms.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, ConvShape],
        imgsz_hw: tuple[int, int],
        round_to: int,
        floor: float,
        images: Callable[[], Iterable[Tensor]],
        times: FactorTimes | None = None,
    ) -> None:
        self._model, self._shapes, self._images = model, shapes, images
        self._round_to, self._floor, self._times = round_to, floor, times
        self.places = places(model, imgsz_hw, shapes)
        if times is not None:
            times.check(self.places)
        self._factorisers: dict[str, Factoriser] = {}
        self._options: dict[str, dict[str, list[Candidate]]] = {}  # knob of the budget -> candidates

    def check(self, limit: Budget) -> None:
        """Check that the budget can be met. No image is needed.

        Raises:
            RecipeError: See `check_reachable`.
        """
        price = conv_price(limit.knob, self._times)
        options = {block: candidates(place, price, self._round_to, self._floor) for block, place in self.places.items()}
        check_reachable(limit.cost(self._shapes), limit, options, self._round_to)

    def plan(self, limit: Budget) -> LowRankPlan:
        """Return the plan that meets the budget with the least output error.

        Raises:
            RecipeError: See `choose`.
            DataError, NumericsError: See `calibration_stats.input_moments`.
        """
        self._measure()
        if limit.knob not in self._options:
            price = conv_price(limit.knob, self._times)
            self._options[limit.knob] = {
                block: candidates(place, price, self._round_to, self._floor, self._factorisers[block])
                for block, place in self.places.items()
            }
        options = self._options[limit.knob]
        whole = limit.cost(self._shapes)
        chosen = choose(whole, limit, options, self._round_to)
        parts = {self.places[block].conv: way for block, way in chosen.items() if way.scheme}
        after: dict[str, ConvShape] = {}
        macs: dict[str, tuple[int, int]] = {}
        for name, shape in self._shapes.items():
            own = {name: shape}
            if name in parts:
                own = self.places[name.removesuffix(".conv")].factors(parts[name].scheme, parts[name].ranks)  # type: ignore[arg-type]
            after |= own
            macs[name] = (shape.macs, sum(one.macs for one in own.values()))
        saved = sum(options[block][0].cost - way.cost for block, way in chosen.items())
        return LowRankPlan(
            chosen={block: way for block, way in chosen.items() if way.scheme},
            macs=macs,
            parameters_before=int(parameters_price(self._shapes)(*full_channels(self._shapes))),
            parameters_after=int(parameters_price(after)(*full_channels(after))),
            cost=whole - saved,
            error=sum(way.error for way in chosen.values()),
        )

    def apply(self, model: nn.Module, plan: LowRankPlan, reconstruct: bool) -> None:
        """Factorise `model`, the model of this object or a copy of it, in place.

        Args:
            model: The model.
            plan: Which blocks, and how.
            reconstruct: Refit the last factors on the calibration images.
        """
        self._measure()
        chains: dict[str, nn.Sequential] = {}
        for block, way in plan.chosen.items():
            assert way.scheme is not None
            factoriser = self._factorisers[block]
            factors = factoriser.factors(way.scheme, way.ranks)
            chain = chains[block] = chain_of(model.get_submodule(block), way.scheme, factors)
            if not reconstruct:
                norm: Any = chain[-1].bn
                norm.running_mean.sub_(factoriser.lost_mean_O(factors).to(norm.running_mean))
        if reconstruct:
            like = next(model.parameters())
            with torch.no_grad(), evaluating(model):
                refit_last(model, chains, self._images(), lambda images: model(images.to(like.device, like.dtype)))
        for block, chain in chains.items():
            replace_block(model, block, chain.train(model.training))
        refresh_attributes(model)

    def _measure(self) -> None:
        if self._factorisers:
            return
        statistics: Mapping[str, InputStatistics] = input_statistics(
            self._model, {place.conv: place.kernel for place in self.places.values()}, self._images()
        )
        self._factorisers = {
            block: Factoriser(self._model.get_submodule(block), statistics[place.conv])
            for block, place in self.places.items()
        }


def uniform(model: nn.Module, found: Mapping[str, Place], scheme: Scheme, share: float, round_to: int) -> None:
    """Factorise every block that the scheme applies to, with ranks of one share of `Place.full_ranks`, in place.

    The weights are those of a white input: such a model is only timed.
    """
    for block, place in found.items():
        if scheme in place.schemes():
            ranks = tuple(max(1, round(share * rank / round_to)) * round_to for rank in place.full_ranks(scheme))
            ranks = tuple(min(rank, limit) for rank, limit in zip(ranks, place.full_ranks(scheme), strict=True))
            module = model.get_submodule(block)
            chain = chain_of(module, scheme, Factoriser(module, None).factors(scheme, ranks))
            replace_block(model, block, chain)
    refresh_attributes(model)


def listed(plan: LowRankPlan) -> dict[str, str]:
    """Return block -> its factors for people: "tucker 32, 48"."""
    return {block: f"{way.scheme} {', '.join(map(str, way.ranks))}" for block, way in plan.chosen.items()}
