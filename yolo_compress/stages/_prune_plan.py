"""Choose which channels `prune` removes. The budget, the importance of channels and the limits per channel group decide.

If the budget is in ms, the pruned model is built and timed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from yolo_compress import progress
from yolo_compress.files.atomic import atomic_write
from yolo_compress.files.csv_text import csv_text
from yolo_compress.nets.families import check_prunable
from yolo_compress.prune import budget, depth, latency, sensitivity
from yolo_compress.prune.budget import Budget, Plan, choose
from yolo_compress.prune.calibration_stats import Evidence, Moments
from yolo_compress.prune.cost import ConvShape, conv_shapes
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.depth import remove
from yolo_compress.prune.graph import Group, prunable, prune
from yolo_compress.prune.low_rank import LowRank, LowRankPlan
from yolo_compress.recipe.recipe import PruneConfig
from yolo_compress.report.schema import SensitivityFile
from yolo_compress.runtime.measure.layer_times import LayerTable
from yolo_compress.stages import Job, load_progress
from yolo_compress.stages._calibration_images import calibration_samples, letterboxed
from yolo_compress.stages._model_score import MEASURES
from yolo_compress.stages.file_types import AskedMs, PruneSensitivityBegun
from yolo_compress.stages.metrics import LatencyBudget
from yolo_compress.train import checkpoint, losses

P = TypeVar("P", Plan, LowRankPlan)
EPOCHS_OF_SENSITIVITY = 2  # most time for sensitivity by loss, in training epochs
FORWARDS_PER_STEP = (
    2  # forward passes in the time of a training step: three, less one for reading, loss and reconstruction
)


def probe(job: Job, weights: Path, folder: Path) -> None:
    """Write the model at several widths into `folder`. A robot can then time the layers (`runtime.measure.layer_times`)."""
    config: PruneConfig = job.config
    latency.write_probe(
        checkpoint.load_model(weights),
        folder,
        job.imgsz_hw,
        job.dataset.names,
        config.round_to,
        factors=config.factorises,
    )


def bottlenecks_text(bottlenecks: Mapping[str, tuple[int, int]]) -> str:
    """Return the layers that lose bottlenecks: "10 -> 8 (model.4 2 -> 1, model.6 2 -> 1)"."""
    before, after = (sum(pair[side] for pair in bottlenecks.values()) for side in (0, 1))
    changed = ", ".join(f"{layer} {old} -> {new}" for layer, (old, new) in bottlenecks.items() if new < old)
    return f"{before} -> {after}" + (f" ({changed})" if changed else "")


def check(config: PruneConfig, model: nn.Module, imgsz_hw: tuple[int, int]) -> None:
    """Check the section `prune` as far as possible without trained weights.

    `prune.latency_ms` is checked only with `prune.latency_table`, because otherwise the layers would have to be timed.

    Args:
        config: Section `prune` with kind "channel" or "low_rank".
        model: Model of `baseline`, untrained. Training does not change its channel counts. With `prune.depth` it is changed.
        imgsz_hw: Height and width of the input, px.

    Raises:
        RecipeError: The criterion is unknown, the table was measured with another model or image size, no pruning reaches
            the budget, `prune.depth` is true and the model has no bottlenecks, or the model is factorised already.
        EnvironmentLacks: The runtime to time layers on is missing.
        CorruptArtifact: The table of layer times is damaged.
    """
    find(config.criterion)
    check_prunable(model)
    table = times = None
    if config.depth:
        depth.require_chains(model)
    if config.latency_ms is not None:
        if config.latency_table is None:
            return latency.require(config.latency_runtime, "prune.latency_runtime")
        whole = latency.read_table(Path(config.latency_table), imgsz_hw)
        table, times = latency.without_factors(whole), latency.factor_times(whole)
    shapes = conv_shapes(model, imgsz_hw)
    limit = _budget(config, shapes, table)
    if config.factorises:
        if config.kind == "low_rank":
            return LowRank(model, shapes, imgsz_hw, config.round_to, config.floor, tuple, times).check(limit)
        limit = _part_of(limit, table, 1 - config.then_share)
    if config.depth:  # the smallest model is the one without bottlenecks
        found = depth.chains(model)
        counts = dict.fromkeys(found, 0)
        depth.shorten(model, counts)
        shapes = depth.remaining_shapes(shapes, found, counts)
    groups = prunable(model)
    least = _floors(config, {group.name: group.width for group in groups})
    budget.check_reachable(model, groups, limit, config.round_to, shapes, config.floor, least)
    if (
        config.then == "low_rank" and config.scope == "local" and not config.depth
    ):  # the widths hardly depend on the scores
        even = {group.name: torch.zeros(group.width) for group in groups}
        narrow = copy.deepcopy(model)
        prune(narrow, choose(model, groups, even, limit, config.round_to, shapes, config.floor, config.scope).keep)
        low_rank = LowRank(narrow, conv_shapes(narrow, imgsz_hw), imgsz_hw, config.round_to, config.floor, tuple, times)
        low_rank.check(_budget(config, shapes, table))
    return None


def _floors(config: PruneConfig, dense: Mapping[str, int]) -> dict[str, int]:
    """Return group -> number of channels that it must keep: `prune.floor` times its width before the first round."""
    return {name: max(1, round(config.floor * width)) for name, width in dense.items()}


def _budget(config: PruneConfig, shapes: Mapping[str, ConvShape], table: LayerTable | None) -> Budget:
    knob, value = config.budget
    if table is not None:
        return budget.latency_ms(shapes, table, value)
    make = budget.keep_flops if knob == "keep_flops" else budget.keep_params
    return make(shapes, value)


def _part_of(limit: Budget, table: LayerTable | None, part: float) -> Budget:
    """Return the budget that makes a share `part` of the reduction, where equal shares reduce the cost by the same factor."""
    start = float(table["whole_ms"]) if table else limit.unit
    return replace(limit, target=start * (limit.target / start) ** part)


class Planner:
    """Chooses which channels to remove from one model, in one or several rounds, until the model meets the budget."""

    def __init__(self, job: Job, model: nn.Module) -> None:
        self.job = job
        self.config: PruneConfig = job.config
        self.samples = calibration_samples(job, self.config.calib_images)
        self.dense = {group.name: group.width for group in prunable(model)}
        found = depth.require_chains(model) if self.config.depth else {}
        self.bottlenecks = {layer: len(chain.bottlenecks) for layer, chain in found.items()}
        self.shapes = conv_shapes(model, job.imgsz_hw)
        whole = self._table(model) if self.config.latency_ms is not None else None
        self.table = latency.without_factors(whole) if whole else None
        self.times = latency.factor_times(whole) if whole and self.config.factorises else None
        self.budget = _budget(self.config, self.shapes, self.table)
        self.least: Mapping[str, int] = {}

    @property
    def channel_budget(self) -> Budget:
        """The budget of the channels: that of the stage, or a looser one if `prune.then` makes the rest of the reduction."""
        part = 1 - self.config.then_share if self.config.then == "low_rank" else 1.0
        return _part_of(self.budget, self.table, part)

    def images(self) -> Iterator[Tensor]:
        """Return batches of the calibration images."""
        return letterboxed(self.samples, self.job.imgsz_hw, self.job.dataset.channels)

    def evidence(self, model: nn.Module) -> Evidence:
        """Return the evidence for the channels of a model."""
        return self._evidence(model, prunable(model))

    def one_cut(self, evidence: Evidence, limit: Budget | None = None) -> Plan:
        """Return the channels to remove in one step. For a budget in ms, the latency comes from the table of layer times.

        Args:
            evidence: `evidence` of the model before any pruning.
            limit: Another budget than that of the stage.
        """
        importance = scores(evidence, find(self.config.criterion))
        return self._choose(evidence.model, evidence, importance, self.shapes, limit or self.budget)

    def cut(self, model: nn.Module, work: Path, number: int) -> tuple[Plan, Evidence, LatencyBudget]:
        """Return the channels to remove in round `number`, counted from 1.

        Measurements are stored in `work`, because a resumed run must choose the same widths as the killed one.

        Returns:
            The plan (which channels to remove), the evidence for it, and the metrics of a latency budget.
        """
        evidence = self.evidence(model)
        importance = scores(evidence, find(self.config.criterion))
        if number == 1 and self.config.sensitivity != "off":
            self.least = self._sensitivity(model, evidence, importance, work)
        choose_for = partial(self._choose, model, evidence, importance, conv_shapes(model, self.job.imgsz_hw))
        if self.config.then == "low_rank":
            return choose_for(self.channel_budget), evidence, {}
        if self.table is None or number < self.config.rounds:
            return choose_for(_part_of(self.budget, self.table, number / self.config.rounds)), evidence, {}
        plan, metrics = self.within_ms(model, choose_for, remove, work)
        return plan, evidence, metrics

    def _evidence(
        self, model: nn.Module, groups: Sequence[Group], moments: dict[str, Moments] | None = None
    ) -> Evidence:
        job = self.job
        return Evidence(
            model,
            groups,
            images=self.images,
            losses=partial(losses.losses, dataset=job.dataset, samples=self.samples, imgsz_px=max(job.imgsz_hw)),
            seed=job.recipe.run.seed,
            moments=moments,
        )

    def _choose(
        self,
        model: nn.Module,
        evidence: Evidence,
        importance: Mapping[str, Tensor],
        shapes: Mapping[str, ConvShape],
        limit: Budget,
    ) -> Plan:
        """Return the channels to remove, and with `prune.depth` the bottlenecks."""
        found = depth.chains(model) if self.config.depth else {}
        if not found:  # also if earlier rounds have removed all bottlenecks
            return self._choose_widths(model, evidence.groups, importance, shapes, limit)
        counts = depth.search(
            model,
            evidence.moments,
            shapes,
            limit,
            lambda groups, left: self._choose_widths(model, groups, importance, left, limit),
            self.config.reconstruct,
        )
        # The shorter model has importance scores of its own.
        shallow = copy.deepcopy(model)
        depth.shorten(shallow, counts, evidence.moments if self.config.reconstruct else None)
        moments = depth.remaining_moments(evidence.moments, found, counts)
        own = self._evidence(shallow, prunable(shallow), moments)
        left = depth.remaining_shapes(shapes, found, counts)
        plan = self._choose_widths(shallow, own.groups, scores(own, find(self.config.criterion)), left, limit)
        return depth.with_bottlenecks(plan, evidence.groups, shapes, found, counts)

    def _choose_widths(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        importance: Mapping[str, Tensor],
        shapes: Mapping[str, ConvShape],
        limit: Budget,
    ) -> Plan:
        config = self.config
        least = {name: max(self.least.get(name, 1), floor) for name, floor in _floors(config, self.dense).items()}
        return choose(model, groups, importance, limit, config.round_to, shapes, config.floor, config.scope, least)

    # --- budgets ------------------------------------------------------------------------------------------------------

    def _table(self, model: nn.Module) -> LayerTable:
        """Return the table of layer times: read from `prune.latency_table`, or timed here once and stored in `work`."""
        config, size = self.config, self.job.imgsz_hw
        if config.latency_table is not None:
            return latency.read_table(Path(config.latency_table), size)
        file = self.job.work / "latency.json"
        if not file.is_file():
            factors = ", and factors of each scheme" if config.factorises else ""
            progress.say(f"prune: timing layers on {config.latency_runtime} at {len(latency.WIDTHS)} widths{factors}")
            latency.write_probe(
                model,
                self._probe,
                size,
                self.job.dataset.names,
                config.round_to,
                config.latency_runtime,
                config.latency_precision,
                config.factorises,
            )
            table = latency.take_table(self._probe, config.latency_runtime, config.latency_precision)
            atomic_write(file, json.dumps(table) + "\n")
        return latency.read_table(file, size)

    @property
    def _probe(self) -> Path:
        return self.job.work / "probe"

    def _asked(self) -> LatencyBudget:
        assert self.table is not None and self.config.latency_ms is not None
        return {"latency_target_ms": self.config.latency_ms, "latency_runtime": self.table["runtime"]}

    def within_ms(
        self, model: nn.Module, choose_for: Callable[[Budget], P], apply: Callable[[nn.Module, P], None], work: Path
    ) -> tuple[P, LatencyBudget]:
        """Return the plan for `prune.latency_ms`, and the metrics.

        With `prune.latency_table`, the latency is the sum of the layer times. Without it, models are built and timed here.

        Args:
            model: The model to prune. It is not changed.
            choose_for: Function that returns the plan for a budget.
            apply: Function that makes the model of a plan, in place.
            work: Folder for the measurements.
        """
        if self.config.latency_table is None:
            return self._hit(model, choose_for, apply, work)
        plan = choose_for(self.budget)
        return plan, {**self._asked(), "latency_expected_ms": plan.cost}

    def _hit(
        self, model: nn.Module, choose_for: Callable[[Budget], P], apply: Callable[[nn.Module, P], None], work: Path
    ) -> tuple[P, LatencyBudget]:
        """Return a plan for which the pruned model, built and timed here, has the latency `prune.latency_ms`. Also return the metrics.

        The table of layer times needs another limit than `latency_ms` to give this plan. That limit is stored in `work`.
        """
        assert self.table is not None and self.config.latency_ms is not None
        planner = lambda ms: choose_for(replace(self.budget, target=ms))  # noqa: E731
        file = work / "asked.json"
        if stored := load_progress(file, {"asked_ms": float, "metrics": dict}):
            return planner(stored["asked_ms"]), stored["metrics"]
        config = self.config
        rig = latency.Rig(
            self.job.work, self.job.imgsz_hw, self.job.dataset.names, config.latency_runtime, config.latency_precision
        )
        dense = rig.build_onnx(self._probe / latency.UNPRUNED, "dense")
        table_ms = float(self.table["whole_ms"])
        hit = latency.hit(model, planner, self.config.latency_ms, table_ms, rig, dense, progress.say, apply)
        metrics: LatencyBudget = {
            **self._asked(),
            "latency_measured_ms": hit.measured_ms,
            "latency_dense_ms": hit.unpruned_ms,
        }
        asked: AskedMs = {"asked_ms": hit.asked_ms, "metrics": metrics}
        atomic_write(file, json.dumps(asked) + "\n")
        return hit.plan, metrics

    # --- sensitivity --------------------------------------------------------------------------------------------------

    def _sensitivity(
        self, model: nn.Module, evidence: Evidence, importance: Mapping[str, Tensor], work: Path
    ) -> dict[str, int]:
        """Measure how sensitive each group is to pruning. Return group -> number of channels that it must keep.

        If an earlier run was killed during the measurement, continue it.
        """
        config, tied = self.config, sensitivity.ties(evidence.groups)
        by_loss = config.sensitivity == "loss"
        samples = self.samples[: self._images(len(tied))] if by_loss else self.samples
        value = partial(MEASURES[config.sensitivity], self.job, samples)
        file = work / "sensitivity.json"
        state: PruneSensitivityBegun = cast(PruneSensitivityBegun, load_progress(file, {"groups": dict})) or {
            "groups": {}
        }
        if "dense" not in state:
            state["dense"] = value(model)
        with progress.bar("sensitivity", len(tied), "group", done=len(state["groups"])) as advance:

            def save() -> None:
                atomic_write(file, json.dumps(state) + "\n")
                advance(1)

            moments = evidence.moments if config.reconstruct else None
            sensitivity.measure(model, evidence.groups, importance, moments, value, state["groups"], save)
        caps = sensitivity.caps(state["groups"], state["dense"], config.max_drop, higher_is_better=not by_loss)
        found: SensitivityFile = {
            "measure": "loss" if by_loss else "map50_95",
            "dense": state["dense"],
            "ratios": list(sensitivity.RATIOS),
            "groups": state["groups"],
            "caps": caps,
            "images": len(samples),
        }
        atomic_write(self.job.out / "sensitivity.json", json.dumps(found) + "\n")
        atomic_write(self.job.out / "sensitivity.csv", csv_text(sensitivity.rows(found)))
        return sensitivity.least(evidence.groups, caps)

    def _images(self, tied: int) -> int:
        """Return the number of images per measurement. All measurements then take about EPOCHS_OF_SENSITIVITY training epochs."""
        passes = EPOCHS_OF_SENSITIVITY * FORWARDS_PER_STEP * len(self.job.dataset.train)
        return max(4, min(len(self.samples), passes // (1 + tied * len(sensitivity.RATIOS))))
