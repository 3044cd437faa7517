"""What each group's channels are worth, alone: the loss (or mAP) of the net when one group is thinned and nothing else.

The dense net is measured with the readers of one group silenced for its least important channels, which is what the pruned net
computes, so no surgery is needed. A group that hurts early is capped: it may lose channels only as far as the budget of harm
allows (the sensitivity analysis of Li et al., arXiv 1608.08710, section 3.2, as a bound instead of a picture).
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
    """Groups that lose equally many channels, by the name of their tie: what is thinned together."""
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
    """`value` of the net with one tie thinned by each of `RATIOS`, for every tie.

    Args:
        model: stock model; changed while it is measured, as it was afterwards.
        groups: `graph.prunable(model)`.
        scores: group name -> `importance_C`: the least important channels go.
        moments: of what convolutions read; kept channels take over then. None: removed channels are just gone.
        value: a loss (lower is better) or mAP (higher is better) of the model as it is.
        done: ties measured before; the new ones are added to it.
        after_each: called after each tie, to save `done` and show progress.

    Raises:
        NumericsError: a value is NaN or infinite; names the group.
    """
    for name, members in ties(groups).items():
        if name in done:
            continue
        row = []
        for ratio in RATIOS:
            with thinned(model, members, scores, ratio, moments):
                row.append(value(model))
        if not all(isfinite(one) for one in row):
            raise NumericsError(f"prune: the net's loss is NaN or infinite with {name} thinned")
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
    """The model as if these groups had lost `ratio` of their channels; its tensors come back as they were."""
    keep = {}
    for group in members:
        count = max(1, round((1 - ratio) * group.width))
        keep[group.name] = scores[group.name].sort(descending=True, stable=True).indices[:count].sort().values
    readers = dict.fromkeys(member.module for group in members for member in group.having("in"))
    modules = dict(model.named_modules())
    touched = [modules[name] for name in readers]
    touched += [norm for name in readers if (norm := modules.get(f"{name.removesuffix('conv')}bn")) is not None]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in touched]
    try:
        if moments is not None:
            reconstruct(model, members, keep, moments)
        else:
            _silence(modules, members, keep)
        yield
    finally:
        for module, state in zip(touched, before, strict=True):
            module.load_state_dict(state)


@torch.no_grad()
def _silence(modules: Mapping[str, nn.Module], members: Sequence[Group], keep: Mapping[str, Tensor]) -> None:
    for group in members:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[keep[group.name]] = False
        for member in group.having("in"):
            modules[member.module].weight[:, gone.nonzero().flatten() + member.offset] = 0.0


def caps(
    rows: Mapping[str, Sequence[float]], dense: float, max_drop: float, higher_is_better: bool
) -> dict[str, float]:
    """Share of its channels that each tie may lose before the loss has risen, or mAP fallen, by the share `max_drop`.

    Linear between the ratios measured, from the dense net on; beyond the last ratio nothing is known and nothing allowed.
    """
    worst = dense * (1 - max_drop) if higher_is_better else dense * (1 + max_drop)
    sign = -1.0 if higher_is_better else 1.0
    found = {}
    for name, row in rows.items():
        ratio, harm = 0.0, 0.0
        allowed = sign * (worst - dense)
        cap = RATIOS[-1]
        for next_ratio, value in zip(RATIOS, row, strict=True):
            next_harm = sign * (value - dense)
            if next_harm > allowed:
                cap = ratio + (next_ratio - ratio) * max(0.0, (allowed - harm) / (next_harm - harm))
                break
            ratio, harm = next_ratio, next_harm
        found[name] = cap
    return found


def least(groups: Sequence[Group], cap: Mapping[str, float]) -> dict[str, int]:
    """Channels that each group keeps at least, for `budget.choose`."""
    return {group.name: ceil((1 - cap[group.tie]) * group.width - 1e-9) for group in groups}


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The dense net, then a row a tie: its values at each ratio, its cap."""
    columns = [f"{found['measure']}_at_{ratio:g}" for ratio in found["ratios"]]
    dense = {"group": "dense", **dict.fromkeys(columns, found["dense"])}
    ties = (
        {"group": name, **dict(zip(columns, row, strict=True)), "cap": found["caps"][name]}
        for name, row in found["groups"].items()
    )
    return [dense, *ties]
