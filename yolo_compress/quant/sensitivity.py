"""Measure how much the model loses because each group of tensors is INT8, and choose the cheapest groups to leave in float.

A group is a set of tensors that share a scale (`quant.plan.Group`). If a group is in float, all convolutions that read its tensors
are also float. So no tensor is read in both precisions. NVIDIA measures one block at a time in the same way, but without the cost
in latency (yolo_deepstream, `sensitive_analysis`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from torch import nn

from yolo_compress.errors import CompressError, NumericsError
from yolo_compress.quant.fakequant import in_float
from yolo_compress.quant.plan import Plan

Value = Callable[[nn.Module], float]
RESOLUTION_MS = 1e-3  # resolution of the runtimes' profiles, used as the smallest cost of a group


def measure(
    model: nn.Module, placed: Plan, value: Value, done: dict[str, float], after_each: Callable[[], None]
) -> dict[str, float]:
    """Measure the loss or mAP of the quantised model with one group of tensors in float, for every INT8 group.

    Args:
        model: Model with fake quantisers (`fakequant.attach`). It is unchanged after the call.
        placed: `quant.plan.plan(model)`.
        value: Function that returns the loss (lower is better) or mAP (higher is better) of the model.
        done: Name of the group in float -> loss or mAP, for groups that were measured before. New values are added in place.
        after_each: Function that is called after each group, to save `done` and show progress.

    Returns:
        `done`, with the values of all INT8 groups.

    Raises:
        NumericsError: A loss or mAP is NaN or infinite.
    """
    for group in placed.int8:
        if group.name in done:
            continue
        with in_float(model, [group]):
            measured = value(model)
        if not isfinite(measured):
            raise NumericsError(f"qat: the loss is NaN or infinite with {group.name} in float; check the model")
        done[group.name] = measured
        after_each()
    return done


def price_ms(placed: Plan, layer_ms: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return, for each INT8 group, how many ms slower its convolutions are in float than in INT8.

    These are the convolutions that read a tensor of the group.

    Args:
        placed: `quant.plan.plan(model)`.
        layer_ms: Convolution -> (FP32 ms, INT8 ms), each with its activation, from engines of the complete model.

    Returns:
        Name of the group -> cost in ms, at least `RESOLUTION_MS`. With a cost of 0, a group would always be chosen first.

    Raises:
        CompressError: An INT8 convolution of `placed` is missing in `layer_ms`.
    """
    convs = {group.name: [name for name in group.convs if name in placed.convs] for group in placed.int8}
    if untimed := sorted({name for names in convs.values() for name in names} - set(layer_ms)):
        raise CompressError(
            f"qat: {', '.join(untimed)} of the plan are not among the {len(layer_ms)} timed convolutions; report this as a bug"
        )
    slowdown_ms = {
        group: sum(layer_ms[name][0] - layer_ms[name][1] for name in names) for group, names in convs.items()
    }
    return {group: max(ms, RESOLUTION_MS) for group, ms in slowdown_ms.items()}


def choose(
    model: nn.Module,
    placed: Plan,
    single_values: Mapping[str, float],
    price: Mapping[str, float],
    value: Value,
    int8: float,
    limit: float,
    higher_is_better: bool,
) -> tuple[tuple[str, ...], float]:
    """Choose groups of tensors to leave in float. With them, the loss or mAP of the model reaches `limit` at low cost.

    Groups are chosen in the order of gain divided by cost, until the limit is reached. The gain is the improvement when only this
    group is in float (`single_values`). The model is measured again after each choice, since the gains do not add up. A group
    without gain is never chosen. At the end, each chosen group returns to INT8 if the model reaches the limit without it.

    Args:
        model: Model with fake quantisers.
        placed: `quant.plan.plan(model)`.
        single_values: Result of `measure`.
        price: Group name -> cost of leaving the group in float, above 0: GFLOPs of its convolutions, or ms from `price_ms`.
        value: Function that returns the loss or mAP of the model, as in `measure`.
        int8: Loss or mAP with all groups in INT8.
        limit: Worst loss or mAP that is acceptable.
        higher_is_better: True for mAP, False for loss.

    Returns:
        Names of the chosen groups, and the loss or mAP with these groups in float.
    """
    sign = 1.0 if higher_is_better else -1.0
    gain = {name: sign * (single - int8) for name, single in single_values.items()}
    groups = {group.name: group for group in placed.int8}
    chosen: list[str] = []
    best = int8

    def with_float(names: list[str]) -> float:
        with in_float(model, [groups[name] for name in names]):
            return value(model)

    for name in sorted(gain, key=lambda name: (-gain[name] / price[name], name)):
        if sign * (best - limit) >= 0 or gain[name] <= 0:
            break
        chosen.append(name)
        best = with_float(chosen)
    for name in sorted(chosen, key=lambda name: -price[name]):
        fewer = [other for other in chosen if other != name]
        without = with_float(fewer) if sign * (best - limit) >= 0 else None
        if without is not None and sign * (without - limit) >= 0:
            chosen, best = fewer, without
    return tuple(chosen), best


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the report's sensitivity table: the float model, the INT8 model, then one row per group by gain."""
    name, better = found["measure"], 1 if found["measure"] == "map50_95" else -1
    ends = [{"group": "all float", name: found["float"]}, {"group": "all int8", name: found["int8"]}]
    ranked = sorted(found["groups"].items(), key=lambda item: better * (found["int8"] - item[1]))
    return ends + [
        {
            "group": group,
            name: value,
            "gives_back": better * (value - found["int8"]),
            "compute_gflops": found["compute_gflops"][group],
            **({"price_ms": found["price_ms"][group]} if "price_ms" in found else {}),
            "float": group in found["left"],
        }
        for group, value in ranked
    ]
