"""Remove whole bottlenecks, beside channels: how many each layer keeps, the output error that this causes, and the surgery.

A layer such as C2f loses its last bottlenecks only. Then all other bottlenecks compute what they did before, and only one
convolution, the reader, has fewer input channels. So the output error is known exactly from the moments of the reader's input.
If another bottleneck went, the next one would read something else.

`counts` is everywhere: layer -> number of bottlenecks that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.nets.blocks import keep_first_bottlenecks
from yolo_compress.nets.conv import keep_channels, norm_after
from yolo_compress.nets.families import check_prunable, refresh_attributes
from yolo_compress.nets.flow import Chain
from yolo_compress.prune.budget import Budget, Plan
from yolo_compress.prune.calibration_stats import Moments
from yolo_compress.prune.cost import ConvShape, full_channels, parameters_price
from yolo_compress.prune.graph import Group, prunable, prune
from yolo_compress.prune.reconstruct import add_ridge, reconstruct, refit

# Chooses channels of a model without some bottlenecks. Arguments: its groups and its shapes. Raises RecipeError if it cannot.
ChooseWidths = Callable[[Sequence[Group], Mapping[str, ConvShape]], Plan]

COARSE = 8  # number of depths that `search` tries first


def chains(model: nn.Module) -> dict[str, Chain]:
    """Return layer -> its bottlenecks, for each layer that can lose some.

    Raises:
        RecipeError, NumericsError: See `families.check_prunable`.
    """
    return {layer: chain for layer, chain in check_prunable(model).chains.items() if chain.bottlenecks}


def require_chains(model: nn.Module) -> dict[str, Chain]:
    """Return `chains`.

    Raises:
        RecipeError: There are none, or see `chains`.
        NumericsError: See `chains`.
    """
    found = chains(model)
    if not found:
        raise RecipeError(
            "prune.depth: no layer of this model has a bottleneck that can be removed; leave prune.depth out"
        )
    return found


def remove(model: nn.Module, plan: Plan, moments: Mapping[str, Moments] | None = None) -> None:
    """Remove the bottlenecks and channels of a plan, in place.

    Args:
        model: The model that the plan was made for.
        plan: What stays.
        moments: `calibration_stats.input_moments` of `model`, to reconstruct the remaining weights. If None, they stay as they are.
    """
    counts = {layer: after for layer, (_, after) in plan.bottlenecks.items()}
    if counts:
        found = chains(model)
        shorten(model, counts, moments)
        moments = moments and remaining_moments(moments, found, counts)
    if moments is not None:
        reconstruct(model, prunable(model), plan.keep, moments)
    prune(model, plan.keep)


@torch.inference_mode(False)
def shorten(model: nn.Module, counts: Mapping[str, int], moments: Mapping[str, Moments] | None = None) -> None:
    """Remove the last bottlenecks of layers, in place. All modules keep their Ultralytics classes.

    Args:
        model: Stock model, pruned or not.
        counts: Layers that are not listed keep all bottlenecks.
        moments: As for `remove`.

    Raises:
        RecipeError: A layer has no bottlenecks or fewer than it is to keep, or see `families.check_prunable`.
        NumericsError: See `families.check_prunable`.
    """
    found = check_prunable(model).chains
    for layer, count in counts.items():
        have = len(found[layer].bottlenecks) if layer in found else 0
        if not 0 <= count <= have:
            raise RecipeError(
                f"prune: {layer} has {have} bottlenecks that can be removed, and {count} of them are to stay"
            )
    modules = dict(model.named_modules())
    for layer, count in counts.items():
        chain = found[layer]
        if count == len(chain.bottlenecks):
            continue
        reader, end = modules[chain.reader], chain.ends[count]
        if moments is not None:
            removed_R = torch.arange(end, chain.ends[-1])
            refit(reader, norm_after(modules, chain.reader), removed_R, moments[chain.reader])
        keep_first_bottlenecks(modules[layer], count)
        keep_channels(reader, None, torch.arange(end))
    refresh_attributes(model)


def remaining_moments(
    moments: Mapping[str, Moments], found: Mapping[str, Chain], counts: Mapping[str, int]
) -> dict[str, Moments]:
    """Return the moments of a model without some bottlenecks, from the `moments` of the model with its bottlenecks `found`."""
    cut = dict(moments)
    for layer, count in counts.items():
        chain, end = found[layer], found[layer].ends[count]
        cut[chain.reader] = Moments(moments[chain.reader].mean_C[:end], moments[chain.reader].cov_CC[:end, :end])
    return cut


def remaining_shapes(
    shapes: Mapping[str, ConvShape], found: Mapping[str, Chain], counts: Mapping[str, int]
) -> dict[str, ConvShape]:
    """Return the `conv_shapes` of a model without some bottlenecks, from the `shapes` of the model with its bottlenecks `found`."""
    gone = tuple(f"{name}." for layer, count in counts.items() for name in found[layer].bottlenecks[count:])
    left = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    for layer, count in counts.items():
        reader = found[layer].reader
        left[reader] = replace(left[reader], in_channels=found[layer].ends[count])
    return left


def search(
    model: nn.Module,
    moments: Mapping[str, Moments],
    shapes: Mapping[str, ConvShape],
    limit: Budget,
    choose_widths: ChooseWidths,
    refitted: bool,
) -> dict[str, int]:
    """Return the `counts` for which a model within the budget has the least output error.

    Bottlenecks are first put into an order: each step removes the one that adds the least output error for the cost that it saves.
    For a number of steps, `choose_widths` removes as many channels as the budget then demands. The number of steps is the one with
    the least total output error: the sum over all convolutions of the error relative to the variance of their output. This is the
    unit of the criterion `obs`, and it is the same for channels and bottlenecks, whichever criterion chooses the channels.

    An error inside a bottleneck counts less: it is multiplied by the error that the removal of the whole bottleneck causes. Without
    this factor, a bottleneck would look better removed only because its convolutions no longer have errors.

    Args:
        model: Stock model. It is not changed.
        moments: `calibration_stats.input_moments` of `model`.
        shapes: `cost.conv_shapes` of `model`.
        limit: Limit for the cost.
        choose_widths: See `ChooseWidths`.
        refitted: Whether the remaining weights are refitted by least squares after the cut.

    Raises:
        RecipeError: No number of bottlenecks allows the budget. The message is that of the model without any of them.
    """
    found, errors = chains(model), _Errors(model, moments, refitted)
    steps = _order(found, shapes, limit, errors)
    tried: dict[int, tuple[float, dict[str, int]]] = {}
    refused: dict[int, RecipeError] = {}

    shallow, taken = copy.deepcopy(model), 0  # a copy of a large model takes longer than the rest of an attempt

    def attempt(number: int) -> None:
        nonlocal shallow, taken
        counts = {layer: len(chain.bottlenecks) - steps[:number].count(layer) for layer, chain in found.items()}
        if number < taken:
            shallow = copy.deepcopy(model)
        shorten(shallow, counts)
        taken = number
        groups = prunable(shallow)
        try:
            plan = choose_widths(groups, remaining_shapes(shapes, found, counts))
        except RecipeError as error:
            refused[number] = error
        else:
            tried[number] = errors.total(found, counts, groups, plan), counts

    stride = max(1, round(len(steps) / COARSE))
    for number in sorted({*range(0, len(steps), stride), len(steps)}):
        attempt(number)
    if not tried:
        raise refused[len(steps)]
    best = min(tried, key=lambda number: tried[number][0])
    for number in range(max(0, best - stride + 1), min(len(steps), best + stride - 1) + 1):
        if number not in tried and number not in refused:
            attempt(number)
    return min(tried.values(), key=lambda pair: pair[0])[1]


def _order(found: Mapping[str, Chain], shapes: Mapping[str, ConvShape], limit: Budget, errors: _Errors) -> list[str]:
    """Return the order in which bottlenecks go: for each step, the layer that loses its last one."""
    counts = {layer: len(chain.bottlenecks) for layer, chain in found.items()}
    error = {layer: errors.by_count(chain) for layer, chain in found.items()}
    steps = []
    cost = limit.cost(shapes)
    while any(counts.values()):
        per_saving = {}
        for layer, count in counts.items():
            if count:
                less = limit.cost(remaining_shapes(shapes, found, {**counts, layer: count - 1}))
                added = error[layer][count - 1] - error[layer][count]
                per_saving[layer] = added / max(cost - less, np.finfo(float).tiny), less
        layer = min(per_saving, key=lambda one: per_saving[one][0])
        cost = per_saving[layer][1]
        counts[layer] -= 1
        steps.append(layer)
    return steps


class _Errors:
    """Output errors of the convolutions of a model when some of their input channels are removed.

    Args:
        model: The model before the cut.
        moments: `calibration_stats.input_moments` of `model`.
        refitted: Whether the remaining channels are refitted. If not, the outputs lack what the removed channels contributed, except
            its mean, which re-estimating BatchNorm restores.
    """

    def __init__(self, model: nn.Module, moments: Mapping[str, Moments], refitted: bool) -> None:
        self._model = model
        self._moments = moments
        self._refitted = refitted
        self._by_count: dict[str, list[float]] = {}
        self._energies: dict[str, Tensor] = {}  # convolution -> W^T W / variance of its output

    def of(self, conv: str, removed_R: Tensor) -> float:
        """Return the squared output error of a convolution without the input channels `removed_R`, relative to its variance."""
        if not len(removed_R):
            return 0.0
        cov_CC, energy_CC = self._moments[conv].cov_CC, self._energy(conv)
        mask = torch.ones(len(cov_CC), dtype=torch.bool)
        mask[removed_R] = False
        kept_K, removed_R = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        lost_RR = cov_CC[removed_R][:, removed_R]
        if self._refitted:
            cov_KR = cov_CC[kept_K][:, removed_R]
            lost_RR = lost_RR - cov_KR.T @ torch.linalg.solve(add_ridge(cov_CC[kept_K][:, kept_K]), cov_KR)
        return max(0.0, float((energy_CC[removed_R][:, removed_R] * lost_RR).sum()))

    def by_count(self, chain: Chain) -> list[float]:
        """Return the error of the reader if the first 0, 1, 2, ... bottlenecks stay."""
        if chain.reader not in self._by_count:
            self._by_count[chain.reader] = [self.of(chain.reader, _range(chain, n)) for n in range(len(chain.ends))]
        return self._by_count[chain.reader]

    def total(
        self, found: Mapping[str, Chain], counts: Mapping[str, int], groups: Sequence[Group], plan: Plan
    ) -> float:
        """Return the sum of the errors of all convolutions that stay, each with the factor that `search` describes.

        Args:
            found: Bottlenecks of the model before the cut.
            counts: Bottlenecks that stay.
            groups: Channel groups of the model without the other bottlenecks.
            plan: Channels of these groups that stay.
        """
        removed = {found[layer].reader: [_range(found[layer], count)] for layer, count in counts.items()}
        for group in groups:
            mask = torch.ones(group.width, dtype=torch.bool)
            mask[plan.keep[group.name]] = False
            for member in group.having("in"):
                removed.setdefault(member.module, []).append(mask.nonzero().flatten() + member.offset)
        factors = {
            name: before - after
            for chain in found.values()
            for name, (before, after) in zip(chain.bottlenecks, pairwise(self.by_count(chain)), strict=True)
        }
        return sum(_factor(name, factors) * self.of(name, torch.cat(parts)) for name, parts in removed.items())

    def _energy(self, conv: str) -> Tensor:
        if conv not in self._energies:
            weight_CN = self._model.get_submodule(conv).weight.detach().double().cpu().transpose(0, 1).flatten(1)
            energy_CC = weight_CN @ weight_CN.T
            variance = (energy_CC * self._moments[conv].cov_CC).sum().clamp_min(torch.finfo(torch.float32).tiny)
            self._energies[conv] = energy_CC / variance
        return self._energies[conv]


def _factor(conv: str, factors: Mapping[str, float]) -> float:
    """Return the factor of the bottleneck that a convolution is in, or 1."""
    return next((factor for name, factor in factors.items() if conv.startswith(f"{name}.")), 1.0)


def _range(chain: Chain, count: int) -> Tensor:
    """Return the input channels that the reader loses if `count` bottlenecks stay."""
    return torch.arange(chain.ends[count], chain.ends[-1])


def with_bottlenecks(
    plan: Plan,
    groups: Sequence[Group],
    shapes: Mapping[str, ConvShape],
    found: Mapping[str, Chain],
    counts: Mapping[str, int],
) -> Plan:
    """Return a plan for the model with all bottlenecks, from the plan for the model with `counts` of them.

    Args:
        plan: Channels of the model with `counts` bottlenecks.
        groups: Channel groups of the model with all bottlenecks.
        shapes: `cost.conv_shapes` of that model.
        found: `chains` of that model.
        counts: Bottlenecks that stay.
    """
    gone = (0, 0)
    return replace(
        plan,
        widths={group.name: (group.width, plan.widths.get(group.name, gone)[1]) for group in groups},
        macs={name: (shape.macs, plan.macs.get(name, gone)[1]) for name, shape in shapes.items()},
        parameters_before=int(parameters_price(shapes)(*full_channels(shapes))),
        bottlenecks={layer: (len(chain.bottlenecks), counts[layer]) for layer, chain in found.items()},
    )
