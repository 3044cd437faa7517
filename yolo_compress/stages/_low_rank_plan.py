"""Factorise the convolutions of the model in the stage `prune`, and compare the result with channel pruning for the same budget."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from torch import nn

from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import Budget, Unreachable
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.depth import remove
from yolo_compress.prune.low_rank import LowRank, LowRankPlan, listed
from yolo_compress.report.low_rank import is_recommended
from yolo_compress.report.schema import LowRankFigures
from yolo_compress.stages import Job, _model_score
from yolo_compress.stages._prune_plan import Planner
from yolo_compress.stages.metrics import LatencyBudget


class LowRankPlanner:
    """Chooses the factors of one model: that of `prune.kind=low_rank`, or the channel-pruned one of `prune.then=low_rank`.

    Args:
        job: Job of the stage `prune`.
        model: The model. It is not changed.
        planner: Planner of the model before any pruning: its budget, its table of layer times and its calibration images.
    """

    def __init__(self, job: Job, model: nn.Module, planner: Planner) -> None:
        self._job, self._model, self._planner, config = job, model, planner, job.config
        self._low_rank = LowRank(
            model,
            conv_shapes(model, job.imgsz_hw),
            job.imgsz_hw,
            config.round_to,
            config.floor,
            planner.images,
            planner.times,
        )

    def plan(self, limit: Budget | None = None) -> LowRankPlan:
        """Return the plan for a budget. For one in ms, the latency comes from the table of layer times."""
        return self._low_rank.plan(limit or self._planner.budget)

    def timed(self, work: Path) -> tuple[LowRankPlan, LatencyBudget]:
        """Return the plan, and the metrics of a budget in ms. Without a given table, models are built and timed, as for channels."""

        def apply(candidate: nn.Module, plan: LowRankPlan) -> None:
            self._low_rank.apply(candidate, plan, reconstruct=False)  # it is only timed

        return self._planner.within_ms(self._model, self.plan, apply, work)

    def factorise(self, model: nn.Module, plan: LowRankPlan) -> None:
        """Factorise the model of this planner, or a copy of it, in place."""
        self._low_rank.apply(model, plan, self._job.config.reconstruct)

    def figures(self, plan: LowRankPlan, factorised: nn.Module, original: nn.Module) -> LowRankFigures:
        """Compare the factorised model with the original after channel pruning for the same budget. Neither is fine-tuned.

        Both losses are means over the calibration images. For a budget in ms, both models meet it by the table of layer times.

        Args:
            plan: The plan by which the model was factorised.
            factorised: The model, with BatchNorm re-estimated.
            original: The model before any pruning. It is not changed.
        """
        found: LowRankFigures = {
            "factors": listed(plan),
            "convolutions": len(plan.macs),
            "loss": self._loss(factorised),
            "channel_loss": None,
            "runtime": self._planner.table["runtime"] if self._planner.table else None,
            "recommended": False,
        }
        rival = copy.deepcopy(original)
        evidence = self._planner.evidence(rival)
        budget = self._planner.budget
        # in ms, the plan's own cost: models were timed and the limit adjusted until the factorised one met it
        limit = replace(budget, target=plan.cost) if self._planner.table else budget
        try:
            channels = self._planner.one_cut(evidence, limit)
        except Unreachable:
            pass  # channels alone cannot meet the budget
        else:
            remove(rival, channels, evidence.moments if self._job.config.reconstruct else None)
            reestimate_batchnorm(rival, self._planner.images())
            found["channel_loss"] = self._loss(rival)
        return {**found, "recommended": is_recommended(found)}

    def _loss(self, model: nn.Module) -> float:
        return _model_score.loss(self._job, self._planner.samples, model)
