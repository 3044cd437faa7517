"""Which tensors INT8 hurts: each group of the plan left in float alone, measured, ranked; then the cheapest set that is enough.

A group is what shares a scale; left in float, the convolutions that read it are float too, so no tensor is read in both. Leave-one-out
is NVIDIA's measure (yolo_deepstream, `sensitive_analysis`), there with one block at a time and no price.
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
RESOLUTION_MS = 1e-3  # of the runtimes' profiles, so the least that a group can cost


def measure(
    model: nn.Module, placed: Plan, value: Value, done: dict[str, float], after_each: Callable[[], None]
) -> dict[str, float]:
    """`value` of the quantised net with one group in float, for every INT8 group of the plan.

    Args:
        model: Attached (`fakequant.attach`); changed while it is measured, as it was afterwards.
        placed: `quant.plan.plan(model)`.
        value: A loss (lower is better) or mAP (higher is better) of the model as it is.
        done: Groups measured before; the new ones are added to it.
        after_each: Called after each group, to save `done` and show progress.

    Raises:
        NumericsError: A value is NaN or infinite; names the group.
    """
    for group in placed.int8:
        if group.name in done:
            continue
        with in_float(model, [group]):
            found = value(model)
        if not isfinite(found):
            raise NumericsError(f"qat: the net's loss is NaN or infinite with {group.name} in float")
        done[group.name] = found
        after_each()
    return done


def price_ms(placed: Plan, layer_ms: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Milliseconds that each INT8 group costs in float: what the convolutions that read it take longer then.

    Args:
        placed: `quant.plan.plan(model)`.
        layer_ms: Convolution -> (in FP32, in INT8), each with its activation, from engines of the whole net.

    Returns:
        At least `RESOLUTION_MS`, for groups that INT8 makes no faster too: one of no price would come before all others.

    Raises:
        CompressError: A convolution was not timed; names it.
    """
    convs = {group.name: [name for name in group.convs if name in placed.convs] for group in placed.int8}
    if untimed := sorted({name for names in convs.values() for name in names} - set(layer_ms)):
        raise CompressError(f"qat: {', '.join(untimed)} of the plan are not among {len(layer_ms)} timed convolutions")
    lost = {group: sum(layer_ms[name][0] - layer_ms[name][1] for name in names) for group, names in convs.items()}
    return {group: max(ms, RESOLUTION_MS) for group, ms in lost.items()}


def choose(
    model: nn.Module,
    placed: Plan,
    alone: Mapping[str, float],
    price: Mapping[str, float],
    value: Value,
    int8: float,
    worst: float,
    higher_is_better: bool,
) -> tuple[tuple[str, ...], float]:
    """Groups to leave in float so that `value` is at `worst` or better, and the value then.

    Greedy by what a group alone gives back for its price; each step is measured, since groups are not independent. A group that
    gives nothing back alone is never taken. Afterwards each group taken is put back into INT8 if the rest is enough.

    Args:
        model: Attached.
        placed: Its plan.
        alone: From `measure`.
        price: Of a group in float, above 0: GFLOPs of its convolutions, or `price_ms`.
        value: As in `measure`.
        int8: `value` with everything in INT8.
        worst: The least that will do.
        higher_is_better: mAP, not loss.
    """
    sign = 1.0 if higher_is_better else -1.0
    gain = {name: sign * (found - int8) for name, found in alone.items()}
    groups = {group.name: group for group in placed.int8}
    taken: list[str] = []
    best = int8

    def with_float(names: list[str]) -> float:
        with in_float(model, [groups[name] for name in names]):
            return value(model)

    for name in sorted(gain, key=lambda name: (-gain[name] / price[name], name)):
        if sign * (best - worst) >= 0 or gain[name] <= 0:
            break
        taken.append(name)
        best = with_float(taken)
    for name in sorted(taken, key=lambda name: -price[name]):
        fewer = [other for other in taken if other != name]
        found = with_float(fewer) if sign * (best - worst) >= 0 else None
        if found is not None and sign * (found - worst) >= 0:
            taken, best = fewer, found
    return tuple(taken), best


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The float net, the INT8 net, then a row a group, what it gives back first."""
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
