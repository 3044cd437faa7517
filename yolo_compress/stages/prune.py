"""Channel pruning to a budget: rank, hand over, cut, re-estimate BatchNorm, fine-tune; in one cut or in rounds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_compress import progress, ultra
from yolo_compress.artifact import atomic_write
from yolo_compress.data import Sample
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.prune import budget, latency, masks, sensitivity
from yolo_compress.prune.budget import Budget, Plan, choose
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.evidence import Evidence
from yolo_compress.prune.graph import Group, prunable, prune
from yolo_compress.prune.price import ConvShape, conv_shapes
from yolo_compress.prune.reconstruct import reconstruct
from yolo_compress.prune.recovery import reestimate_batchnorm
from yolo_compress.recipe import PruneConfig
from yolo_compress.stages import Job
from yolo_compress.stages.batches import chosen, letterboxed
from yolo_compress.stages.training import device, finish, fit, measure, parent

EPOCHS_OF_SENSITIVITY = 2  # training epochs that the default measure may cost, in time
FORWARDS_PER_STEP = 3  # a training step costs about three forward passes


def run(job: Job) -> dict[str, Any]:
    """`model.pt` of stock classes with fewer channels, `channels.json`, `flops.json`, and mAP at each step of the recovery.

    With `prune.sensitivity` also `sensitivity.json` and `sensitivity.csv`.
    """
    config: PruneConfig = job.config
    model = ultra.load_model(job.inputs["sparsify"].file("model.pt")).to(device(job))
    if config.kind != "channel":
        return _zeros(job, model)
    pruner = Pruner(job, model)
    curve: list[dict[str, str]] = []
    for number in range(1, config.rounds + 1):
        part = job if config.rounds == 1 else pruner.part(number)
        metrics = pruner.cut(model, part.work, number)
        last = number == config.rounds
        hooks = [parent(job.inputs["baseline"])] if config.teach_from_parent and part.config.epochs else []
        model = fit(part, model, hooks, "prune" if config.rounds == 1 else f"prune {number}/{config.rounds}")
        curve += _rows(part.out / "results.csv", len(curve))
        if not last:
            progress.say(f"prune: round {number} of {config.rounds} done")
    if config.rounds > 1 and curve:
        atomic_write(job.out / "results.csv", _as_csv(curve))
    return {**metrics, **finish(job, model)}


def _zeros(job: Job, model: nn.Module) -> dict[str, Any]:
    """Zeros by magnitude, held through fine-tuning; no budget applies, as no width changes."""
    config: PruneConfig = job.config
    if config.kind == "two_four":
        found = masks.two_four(model)
    else:
        found = masks.unstructured(model, config.sparsity, "global" if config.scope == "global" else "local")
    masks.apply(model, found)
    dense = sum(isinstance(module, nn.Conv2d) for module in model.modules()) - len(found)
    progress.say(f"prune: {masks.sparsity_of(model):.1%} of the weights are zero; {dense} convolutions stay dense")
    metrics = {"kind": config.kind, **_repaired(job, model, chosen(job, config.calib_images))}
    hooks = [parent(job.inputs["baseline"])] if config.teach_from_parent and config.epochs else []
    return {**metrics, **finish(job, fit(job, model, hooks, "prune"))}


def _repaired(job: Job, model: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """mAP as cut, and after BatchNorm was re-estimated, in place."""
    cut = measure(job, model, "after the cut")["map50_95"]
    reestimate_batchnorm(model, letterboxed(samples, job.imgsz_hw))
    repaired = measure(job, model, "after re-estimating BatchNorm")["map50_95"]
    progress.say(f"prune: mAP50-95 {cut:.3f} after the cut, {repaired:.3f} after re-estimating BatchNorm")
    return {"map50_95_after_cut": cut, "map50_95_after_bn": repaired}


def dry_run(job: Job, weights: Path) -> dict[str, Any]:
    """The plan for the checkpoint, as a `table` and as figures; nothing is trained.

    Budgets in milliseconds are met by the table of layer times alone: only `prune` builds and times the network.
    """
    if job.config.kind != "channel":
        raise RecipeError(f"prune.kind={job.config.kind} changes no width: there is no plan to show")
    model = ultra.load_model(weights).to(device(job))
    pruner = Pruner(job, model)
    plan = pruner.whole_plan(model)
    figures: dict[str, Any] = {
        "widths": plan.widths,
        "gflops": [2 * macs / 1e9 for macs in (plan.macs_before, plan.macs_after)],
        "parameters": [plan.parameters_before, plan.parameters_after],
    }
    if pruner.table is not None:
        figures["expected_ms"] = [pruner.table["whole_ms"], plan.cost]
    return {"table": _plan_text(job, plan, figures), **figures}


def probe(job: Job, weights: Path, folder: Path) -> None:
    """The checkpoint at several widths, for `runtime.layers`."""
    latency.write_probe(ultra.load_model(weights), folder, job.imgsz_hw, job.dataset.names)


def _plan_text(job: Job, plan: Plan, figures: Mapping[str, Any]) -> str:
    lines = [f"{'group':<20} {'channels':>14} {'kept':>6}"]
    for name, (before, after) in plan.widths.items():
        lines.append(f"{name:<20} {before:>5} -> {after:>5} {after / before:>6.0%}")
    height, width = job.imgsz_hw
    totals = [(f"GFLOPs at {height}x{width}", "gflops", ".3f"), ("parameters", "parameters", ",d")]
    if "expected_ms" in figures:
        totals.append((f"ms on {job.config.latency_runtime}, by its layers", "expected_ms", ".2f"))
    lines.append("")
    for title, key, form in totals:
        before, after = figures[key]
        lines.append(f"{title}: {before:{form}} -> {after:{form}} ({after / before:.1%})")
    return "\n".join(lines)


class Pruner:
    """One pruning of one net: what it may cost, what may go, and the cuts on the way there."""

    def __init__(self, job: Job, model: nn.Module) -> None:
        self.job = job
        self.config: PruneConfig = job.config
        self.samples = chosen(job, self.config.calib_images)
        self.groups = prunable(model)
        self.dense = {group.name: group.width for group in self.groups}
        self.shapes = conv_shapes(model, job.imgsz_hw)
        self.table = self._table(model) if self.config.latency_ms is not None else None
        self.budget = self._budget()
        self.least: Mapping[str, int] = {}
        if self.measured_here and self.config.rounds > 1:  # what the last round is compared with
            self._rig.engine(model, "dense")

    @property
    def measured_here(self) -> bool:
        """Whether the budget is milliseconds of this machine."""
        return self.config.latency_ms is not None and self.config.latency_table is None

    def part(self, number: int) -> Job:
        """The job of one round: its share of the epochs, and a scratch folder of its own."""
        count = self.config.rounds
        epochs = self.config.epochs // count + (self.config.epochs % count if number == count else 0)
        work = self.job.work / f"round-{number}"
        work.mkdir(exist_ok=True)
        return replace(self.job, config=self.config.model_copy(update={"epochs": epochs}), work=work)

    def cut(self, model: nn.Module, work: Path, number: int) -> dict[str, Any]:
        """Remove channels from `model` in place, repair what needs no training, and say what is left."""
        plan, metrics = self.plan(model, work, number)
        prune(model, plan.keep)
        self._keep_tables(plan, model)
        metrics["kept_flops"] = plan.macs_after / sum(shape.macs for shape in self.shapes.values())
        progress.say(f"prune: {metrics['kept_flops']:.1%} of the MACs kept")
        metrics |= _repaired(self.job, model, self.samples)
        return metrics

    def plan(self, model: nn.Module, work: Path, number: int) -> tuple[Plan, dict[str, Any]]:
        """What goes in this round; `model` has its weights handed over, and nothing cut yet.

        A plan that was measured is kept in `work`: a resumed run must continue with the widths it started with.
        """
        groups = prunable(model)
        evidence = self._evidence(model, groups)
        importance = scores(evidence, find(self.config.criterion))
        if number == 1 and self.config.sensitivity != "off":
            self.least = self._sensitivity(model, evidence, importance, work)
        choose_for = partial(self._choose, model, groups, importance)
        part = number / self.config.rounds
        metrics: dict[str, Any] = {}
        if self.measured_here and number == self.config.rounds:
            plan, metrics = self._hit(model, choose_for, work)
        else:
            plan = choose_for(self._at(part))
        if self.config.reconstruct:
            reconstruct(model, groups, plan.keep, evidence.moments)
        return plan, metrics

    def whole_plan(self, model: nn.Module) -> Plan:
        """What one cut to the budget would take, by the table where it is milliseconds."""
        importance = scores(self._evidence(model, self.groups), find(self.config.criterion))
        return self._choose(model, self.groups, importance, self.budget)

    def _evidence(self, model: nn.Module, groups: Sequence[Group]) -> Evidence:
        job = self.job
        return Evidence(
            model,
            groups,
            images=lambda: letterboxed(self.samples, job.imgsz_hw),
            losses=partial(ultra.losses, dataset=job.dataset, samples=self.samples, imgsz_px=max(job.imgsz_hw)),
            seed=job.recipe.run.seed,
        )

    def _choose(self, model: nn.Module, groups: Sequence[Group], importance: Mapping[str, Any], limit: Budget) -> Plan:
        floors = {
            name: max(self.least.get(name, 1), round(self.config.floor * self.dense[name])) for name in self.dense
        }
        return choose(
            model,
            groups,
            importance,
            limit,
            self.config.round_to,
            self.job.imgsz_hw,
            floor=self.config.floor,
            scope=self.config.scope,
            least=floors if self.least or self.config.rounds > 1 else None,
        )

    # --- budgets ------------------------------------------------------------------------------------------------------

    def _budget(self) -> Budget:
        knob, value = self.config.budget
        if knob == "latency_ms":
            assert self.table is not None
            return budget.latency_ms(self.shapes, self.table, value)
        make = budget.keep_flops if knob == "keep_flops" else budget.keep_params
        return make(self.shapes, value)

    def _at(self, part: float) -> Budget:
        """The budget after this part of the rounds: equal factors from round to round."""
        dense = float(self.table["whole_ms"]) if self.table else self.budget.unit
        return replace(self.budget, target=dense * (self.budget.target / dense) ** part)

    @property
    def _rig(self) -> latency.Rig:
        config = self.config
        return latency.Rig(
            self.job.work,
            self.job.imgsz_hw,
            self.job.dataset.names,
            config.latency_runtime,
            config.latency_precision,
            None,
        )

    def _table(self, model: nn.Module) -> dict[str, Any]:
        config = self.config
        if config.latency_table is not None:
            return latency.read_table(Path(config.latency_table), self.job.imgsz_hw)
        kept = self.job.work / "latency.json"
        if kept.is_file():
            return latency.read_table(kept, self.job.imgsz_hw)
        progress.say(f"prune: timing layers on {config.latency_runtime} at {len(latency.WIDTHS)} widths")
        folder = self.job.work / "probe"
        latency.write_probe(model, folder, self.job.imgsz_hw, self.job.dataset.names)
        table = latency.take_table(folder, config.latency_runtime, config.latency_precision, None)
        atomic_write(kept, json.dumps(table) + "\n")
        return table

    def _hit(self, model: nn.Module, choose_for: Any, work: Path) -> tuple[Plan, dict[str, Any]]:
        """The plan whose finished network takes `latency_ms`; the limit that was asked of the table is kept."""
        assert self.table is not None and self.config.latency_ms is not None
        planner = lambda ms: choose_for(replace(self.budget, target=ms))  # noqa: E731
        kept = work / "asked.json"
        if kept.is_file():
            found = json.loads(kept.read_text(encoding="utf-8"))
            return planner(found["asked_ms"]), found["metrics"]
        rig = self._rig
        dense = rig.folder / "dense"
        if self.config.rounds == 1 or not dense.is_dir():
            dense = rig.engine(model, "dense")
        whole_ms = float(self.table["whole_ms"])
        hit = latency.hit(model, planner, self.config.latency_ms, whole_ms, rig, dense, progress.say)
        metrics = {
            "latency_target_ms": self.config.latency_ms,
            "latency_measured_ms": hit.measured_ms,
            "latency_dense_ms": hit.dense_ms,
            "latency_runtime": self.config.latency_runtime,
        }
        atomic_write(kept, json.dumps({"asked_ms": hit.asked_ms, "metrics": metrics}) + "\n")
        return hit.plan, metrics

    # --- sensitivity --------------------------------------------------------------------------------------------------

    def _sensitivity(
        self, model: nn.Module, evidence: Evidence, importance: Mapping[str, Any], work: Path
    ) -> dict[str, int]:
        """Least channels by what was measured; the measurement goes on where a killed run stopped."""
        config, tied = self.config, sensitivity.ties(evidence.groups)
        by_loss = config.sensitivity == "loss"
        samples = self.samples[: self._images(len(tied))] if by_loss else self.samples
        value = partial(self._loss if by_loss else self._map, samples)
        kept = work / "sensitivity.json"
        state = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {"groups": {}}
        if "dense" not in state:
            state["dense"] = value(model)
        with progress.bar("sensitivity", len(tied), "group", done=len(state["groups"])) as advance:

            def save() -> None:
                atomic_write(kept, json.dumps(state) + "\n")
                advance(1)

            moments = evidence.moments if config.reconstruct else None
            sensitivity.measure(model, evidence.groups, importance, moments, value, state["groups"], save)
        caps = sensitivity.caps(state["groups"], state["dense"], config.max_drop, higher_is_better=not by_loss)
        found = {
            "measure": config.sensitivity,
            "dense": state["dense"],
            "ratios": list(sensitivity.RATIOS),
            "groups": state["groups"],
            "caps": caps,
            "images": len(samples),
        }
        atomic_write(self.job.out / "sensitivity.json", json.dumps(found) + "\n")
        atomic_write(self.job.out / "sensitivity.csv", sensitivity.to_csv(found))
        return sensitivity.least(evidence.groups, caps)

    def _images(self, tied: int) -> int:
        """How many images each measurement may look at within the time of `EPOCHS_OF_SENSITIVITY` training epochs."""
        passes = EPOCHS_OF_SENSITIVITY * FORWARDS_PER_STEP * len(self.job.dataset.train)
        return max(4, min(len(self.samples), passes // (1 + tied * len(sensitivity.RATIOS))))

    @torch.no_grad()
    def _loss(self, samples: Sequence[Sample], model: nn.Module) -> float:
        values = ultra.losses(model, self.job.dataset, samples, max(self.job.imgsz_hw))
        return float(torch.stack(list(values)).mean())

    def _map(self, samples: Sequence[Sample], model: nn.Module) -> float:
        names, size = self.job.dataset.names, self.job.imgsz_hw
        with TorchBackend(model, names, size) as backend:
            return float(accuracy(backend, list(samples), names, size)["map50_95"])

    # --- tables -------------------------------------------------------------------------------------------------------

    def _keep_tables(self, plan: Plan, model: nn.Module) -> None:
        """Channels and MACs, before any round and after this one."""
        widths = {name: (self.dense[name], after) for name, (_, after) in plan.widths.items()}
        after = conv_shapes(model, self.job.imgsz_hw)
        macs = {name: (_macs(self.shapes, name), _macs(after, name)) for name in self.shapes}
        atomic_write(self.job.out / "channels.json", json.dumps(widths) + "\n")
        atomic_write(self.job.out / "flops.json", json.dumps(macs) + "\n")


def _macs(shapes: Mapping[str, ConvShape], name: str) -> int:
    return shapes[name].macs


def _rows(file: Path, epochs_before: int) -> list[dict[str, str]]:
    """Rows of a round's results.csv, its epochs counted on."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return [{**row, "epoch": str(int(row["epoch"]) + epochs_before)} for row in csv.DictReader(handle)]


def _as_csv(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
