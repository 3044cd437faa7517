"""Sensitivity analysis: measure the loss or mAP with one tie of channel groups pruned at a time, and limit the pruning of each tie.

A tie is a set of channel groups that must lose equal shares of their channels, such as the two halves of a C2f block. To measure a
tie, the weights that read its least important channels are set to zero. The model then computes the same as the pruned model, so no
channels have to be removed. The cap of a tie is the share of its channels that can be removed while the loss (or mAP) stays within
the allowed change. Li et al. (arXiv 1608.08710, section 3.2) plot the same sensitivities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError
from yolo_compress.prune.calibration_stats import Moments
from yolo_compress.prune.graph import Group
from yolo_compress.prune.reconstruct import reconstruct

RATIOS = (0.25, 0.5, 0.75)


def ties(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the channel groups in sets that must lose equal shares of their channels: `Group.tie` -> groups.

    The groups of a set are measured together.
    """
    tied: dict[str, list[Group]] = {}
    for group in groups:
        tied.setdefault(group.tie, []).append(group)
    return tied


def measure(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    moments: Mapping[str, Moments] | None,
    value: Callable[[nn.Module], float],
    done: dict[str, list[float]],
    after_each: Callable[[], None],
) -> dict[str, list[float]]:
    """Measure the loss or mAP of the model with one tie pruned, for every tie and every share in `RATIOS`.

    Args:
        model: Stock model. It is unchanged after the call.
        groups: `graph.prunable(model)`.
        scores: Group name -> `importance_C`. The least important channels are removed.
        moments: Moments of the inputs of convolutions, for reconstruction. If None, weights are not reconstructed.
        value: Function that returns the loss (lower is better) or mAP (higher is better) of the model.
        done: `Group.tie` -> values of ties that were measured before. The new values are added in place.
        after_each: Function that is called after each tie, to save `done` and show progress.

    Returns:
        `done`: `Group.tie` -> loss or mAP for each share in `RATIOS`.

    Raises:
        NumericsError: A loss or mAP is NaN or infinite.
    """
    for name, members in ties(groups).items():
        if name in done:
            continue
        row = []
        for ratio in RATIOS:
            with thinned(model, members, scores, ratio, moments):
                row.append(value(model))
        if not all(isfinite(one) for one in row):
            raise NumericsError(f"prune: the loss is NaN or infinite with {name} pruned; check the model")
        done[name] = row
        after_each()
    return done


@contextmanager
def thinned(
    model: nn.Module,
    members: Sequence[Group],
    scores: Mapping[str, Tensor],
    ratio: float,
    moments: Mapping[str, Moments] | None,
) -> Iterator[None]:
    """Make the model compute as if the groups `members` had lost the share `ratio` of their channels, inside a `with` block."""
    keep = {}
    for group in members:
        count = max(1, round((1 - ratio) * group.steps)) * group.step
        keep[group.name] = scores[group.name].sort(descending=True, stable=True).indices[:count].sort().values
    readers = dict.fromkeys(member.module for group in members for member in group.having("in"))
    modules = dict(model.named_modules())
    changed = [modules[name] for name in readers]
    changed += [norm for name in readers if (norm := modules.get(f"{name.removesuffix('conv')}bn")) is not None]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in changed]
    try:
        if moments is not None:
            reconstruct(model, members, keep, moments)
        else:
            _zero_readers(modules, members, keep)
        yield
    finally:
        for module, state in zip(changed, before, strict=True):
            module.load_state_dict(state)


@torch.no_grad()
def _zero_readers(modules: Mapping[str, nn.Module], members: Sequence[Group], keep: Mapping[str, Tensor]) -> None:
    for group in members:
        removed = torch.ones(group.width, dtype=torch.bool)
        removed[keep[group.name]] = False
        for member in group.having("in"):
            modules[member.module].weight[:, removed.nonzero().flatten() + member.offset] = 0.0


def caps(
    rows: Mapping[str, Sequence[float]], unpruned: float, max_drop: float, higher_is_better: bool
) -> dict[str, float]:
    """Return `Group.tie` -> cap, the largest share of channels that the groups of the tie may lose.

    At the cap the loss has risen, or the mAP has fallen, by `max_drop`. Values between the measured `RATIOS` are interpolated
    linearly. The cap never exceeds the last of `RATIOS`.

    Args:
        rows: `Group.tie` -> loss or mAP for each share in `RATIOS`, from `measure`.
        unpruned: Loss or mAP of the unpruned model.
        max_drop: Allowed change of the loss or mAP, relative to `unpruned`.
        higher_is_better: True for mAP, False for loss.
    """
    limit = unpruned * (1 - max_drop) if higher_is_better else unpruned * (1 + max_drop)
    sign = -1.0 if higher_is_better else 1.0
    result = {}
    for name, row in rows.items():
        ratio, harm = 0.0, 0.0
        allowed = sign * (limit - unpruned)
        cap = RATIOS[-1]
        for next_ratio, value in zip(RATIOS, row, strict=True):
            next_harm = sign * (value - unpruned)
            if next_harm > allowed:
                cap = ratio + (next_ratio - ratio) * max(0.0, (allowed - harm) / (next_harm - harm))
                break
            ratio, harm = next_ratio, next_harm
        result[name] = cap
    return result


def least(groups: Sequence[Group], cap: Mapping[str, float]) -> dict[str, int]:
    """Return group name -> minimum number of channels to keep, for the argument `least` of `budget.choose`.

    Args:
        groups: `graph.prunable` of the model.
        cap: `Group.tie` -> largest share of channels to remove, from `caps`.
    """
    return {group.name: ceil((1 - cap[group.tie]) * group.width - 1e-9) for group in groups}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the report's sensitivity table: the unpruned model, then one row per tie with its values and cap."""
    columns = [f"{found['measure']}_at_{ratio:g}" for ratio in found["ratios"]]
    dense = {"group": "dense", **dict.fromkeys(columns, found["dense"])}
    ties = (
        {"group": name, **dict(zip(columns, row, strict=True)), "cap": found["caps"][name]}
        for name, row in found["groups"].items()
    )
    return [dense, *ties]
