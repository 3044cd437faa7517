"""The plan that `prune` with `dry_run=true` shows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from yolo_compress.errors import RecipeError
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import Plan
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.depth import remove
from yolo_compress.prune.low_rank import LowRankPlan
from yolo_compress.recipe.recipe import PruneConfig
from yolo_compress.report.low_rank import low_rank_note
from yolo_compress.report.schema import LowRankFigures
from yolo_compress.stages import Job
from yolo_compress.stages._low_rank_plan import LowRankPlanner
from yolo_compress.stages._prune_plan import Planner, bottlenecks_text
from yolo_compress.stages._training import device
from yolo_compress.train import checkpoint


class DryRun(TypedDict):
    """What `prune` would remove or factorise, and the cost of the model. Lists and tuples are [before, after] pruning."""

    table: str  # table for the terminal
    widths: dict[str, tuple[int, int]]  # group -> channels
    gflops: list[float]  # GFLOPs of one image
    parameters: list[int]
    bottlenecks: NotRequired[dict[str, tuple[int, int]]]  # layer -> bottlenecks; absent without `prune.depth`
    low_rank: NotRequired[LowRankFigures]  # absent if nothing is factorised
    expected_ms: NotRequired[list[float]]  # latency by the table of layer times; absent for other budgets


def dry_run(job: Job, weights: Path) -> DryRun:
    """Return what `prune` would remove from the checkpoint in one step, or factorise. Nothing is trained or built.

    For a budget in ms the latency comes from the table of layer times. Only `prune` itself builds and times the model.

    Raises:
        RecipeError: `prune.kind` makes zeros.
    """
    config: PruneConfig = job.config
    if config.kind in config.MASKS:
        raise RecipeError(f"prune.kind={config.kind} changes no width: there is no plan to show")
    model = checkpoint.load_model(weights).to(device(job))
    planner = Planner(job, model)
    evidence = planner.evidence(model)
    cuts = planner.one_cut(evidence, planner.channel_budget) if config.kind == "channel" else None
    found: DryRun = {"table": "", "widths": cuts.widths if cuts else {}, "gflops": [], "parameters": []}
    totals = []
    if cuts and cuts.bottlenecks:
        found["bottlenecks"] = cuts.bottlenecks
        totals.append(f"bottlenecks: {bottlenecks_text(cuts.bottlenecks)}")
    last: Plan | LowRankPlan | None = cuts
    parts = [_text(cuts)] if cuts else []
    if config.factorises:
        last, found["low_rank"] = _low_rank(job, evidence, planner, cuts)
        parts.append(_factors_text(last))
        totals.append(low_rank_note(found["low_rank"]))
    assert last is not None
    full = sum(shape.macs for shape in planner.shapes.values()), sum(s.parameters for s in planner.shapes.values())
    found["gflops"] = [2 * macs / 1e9 for macs in (full[0], last.macs_after)]
    found["parameters"] = [full[1], last.parameters_after]
    height, width = job.imgsz_hw
    figures = [
        _total(f"GFLOPs at {height}x{width}", found["gflops"], ".3f"),
        _total("parameters", found["parameters"], ",d"),
    ]
    if planner.table is not None:
        found["expected_ms"] = [planner.table["whole_ms"], last.cost]
        totals.append(_total(f"ms on {planner.table['runtime']}, by its layers", found["expected_ms"], ".2f"))
    return {**found, "table": "\n".join([*parts, "", *figures, *totals])}


def _low_rank(job: Job, evidence: Evidence, planner: Planner, cuts: Plan | None) -> tuple[LowRankPlan, LowRankFigures]:
    """Factorise a copy of the model, after the cut of its channels if there is one. Return the plan and the comparison."""
    small = copy.deepcopy(evidence.model)
    if cuts:
        remove(small, cuts, evidence.moments if job.config.reconstruct else None)
        reestimate_batchnorm(small, planner.images())
    low_rank = LowRankPlanner(job, small, planner)
    plan = low_rank.plan()
    low_rank.factorise(small, plan)
    reestimate_batchnorm(small, planner.images())
    return plan, low_rank.figures(plan, small, evidence.model)


def _factors_text(plan: LowRankPlan) -> str:
    lines = [f"{'convolution':<24} {'factors':<16} {'MACs kept':>9} {'error':>7}"]
    for block, way in plan.chosen.items():
        before, after = plan.macs[f"{block}.conv"]
        ranks = f"{way.scheme} {', '.join(map(str, way.ranks))}"
        lines.append(f"{block:<24} {ranks:<16} {after / before:>9.0%} {way.error:>7.4f}")
    return "\n".join(lines)


def _text(plan: Plan) -> str:
    lines = [f"{'group':<20} {'channels':>14} {'kept':>6}"]
    for name, (before, after) in plan.widths.items():
        lines.append(f"{name:<20} {before:>5} -> {after:>5} {after / before:>6.0%}")
    return "\n".join(lines)


def _total(title: str, both: Sequence[float], form: str) -> str:
    before, after = both
    return f"{title}: {before:{form}} -> {after:{form}} ({after / before:.1%})"
