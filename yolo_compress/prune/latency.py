"""Prune to a latency in ms: measure layer times at several widths, then build and time pruned models until one meets the limit.

The widths are chosen with a table of layer times (`runtime.measure.layer_times`). Each pruned model is then built, and timed in turn
with the unpruned model. Only the ratio of the two times is used, so a machine that becomes slower between two measurements does
not change the result.

The width of each channel group is a multiple of `round_to`. A model has about forty groups, so this is fine enough: YOLOv8n's MACs
are met within 0.1 % in steps of 16. Smaller steps would not change the time, since vector units process 16 channels at once.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import onnx
import torch
from torch import nn

from yolo_compress.errors import CompressError, CorruptArtifact, EnvironmentLacks, RecipeError
from yolo_compress.export.timed_onnx import export_timed
from yolo_compress.files import strict_json
from yolo_compress.files.atomic import atomic_write
from yolo_compress.nets import detect
from yolo_compress.nets.factors import SCHEMES, is_factor
from yolo_compress.prune import low_rank
from yolo_compress.prune.cost import conv_shapes, table_scale
from yolo_compress.prune.graph import Group, prunable, prune
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.layer_times import LAYERS, SCHEMA, LayerTable
from yolo_compress.runtime.measure.messages import Spec

WIDTHS = (1.0, 0.75, 0.5, 0.25)
UNPRUNED = "100.onnx"  # the unpruned model, the first of `WIDTHS`
TOLERANCE = 0.05  # largest error of the pruned model's latency, relative to the limit; the recipe documents it
CLOSE_ENOUGH = 0.02  # relative error at which the search stops, three standard errors below TOLERANCE
TRIES = 6
# Values per launch. Rounds are short, so that other load on the machine slows both compared models alike.
ROUNDS, SAMPLES = 6, 15
LAUNCHES = (5, 12)  # smallest and largest number of launches per comparison; it stops when the median is `SETTLED`
SETTLED = 0.01  # relative standard error of the ratio


class Planned(Protocol):
    """What stays of a model: a `Plan` of channels or a `LowRankPlan`."""

    @property
    def kept_flops(self) -> float: ...


P = TypeVar("P", bound=Planned)


def write_probe(
    model: nn.Module,
    folder: Path,
    imgsz_hw: tuple[int, int],
    names: Sequence[str],
    round_to: int,
    runtime: str = "",
    precision: str = "fp32",
    factors: bool = False,
) -> None:
    """Write ONNX files of the model at all `WIDTHS`, and the `layers.json` that `runtime.measure.layer_times` reads.

    These files are the probe: they are only timed. Each group keeps its first channels, since the latency does not depend on which
    channels are removed. With `factors`, there is also a file for each scheme of `nets.factors` and each of `low_rank.SHARES`, in
    which every convolution that allows it is factorised.

    Args:
        model: Stock model. It is not changed.
        folder: Output folder, created if it does not exist.
        imgsz_hw: Height and width in pixels.
        names: Class names in the order of their index.
        round_to: Widths are multiples of this number. Use the same number when channels are chosen with the layer times.
        runtime, precision: For INT8, the runtime that the files are for. Files in float are for every runtime.
        factors: Also time factors, for `low_rank`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = []
    nodes: dict[str, str] = {}

    def add(timed: nn.Module, file: str) -> None:
        export_timed(timed, folder / file, imgsz_hw, names, runtime, precision)
        shapes = conv_shapes(timed, imgsz_hw)
        if factorised := [name for name in shapes if is_factor(name)]:
            shapes = {name: shapes[name] for name in factorised}  # the times of the others are known
        models.append({"file": file, "macs": {name: shape.macs for name, shape in shapes.items()}})
        nodes.update(node_prefixes(folder / file, [name for name in shapes if name not in nodes]))

    for width in WIDTHS:
        narrow = copy.deepcopy(model)
        if width < 1:
            groups = prunable(narrow)
            prune(narrow, {group.name: torch.arange(_narrow_width(group, width, round_to)) for group in groups})
        add(narrow, f"{round(100 * width):03d}.onnx")
    if factors:
        found = low_rank.places(model, imgsz_hw, conv_shapes(model, imgsz_hw))
        for scheme in SCHEMES:
            for share in low_rank.SHARES:
                split = copy.deepcopy(model)
                low_rank.uniform(split, found, scheme, share, round_to)
                add(split, f"{scheme}-{round(100 * share):03d}.onnx")
    described = {"networks": models, "nodes": nodes, "imgsz": list(imgsz_hw)}
    atomic_write(folder / LAYERS, json.dumps(described) + "\n")


def _narrow_width(group: Group, width: float, round_to: int) -> int:
    unit = min(round_to, group.unit)
    return max(1, round(width * group.steps / unit)) * unit * group.step


def node_prefixes(file: Path, convs: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Return convolution -> the name prefix that the ONNX nodes of the convolution and of its activation have in common."""
    prefixes: dict[str, str] = {}
    for node in onnx.load(str(file)).graph.node:
        name = node.input[1].removesuffix("_dequantized").removesuffix(".weight") if node.op_type == "Conv" else ""
        if name in convs:
            prefixes[name] = node.name.removesuffix("conv/Conv")
    for name in convs:
        if place := detect.exported_prefix(name):
            prefixes[name] = place
    missing = [name for name in convs if name not in prefixes]
    if missing:
        raise CompressError(
            f"{file}: no node computes {missing[0]}, so layer times cannot be assigned; report this as a bug"
        )
    return prefixes


def take_table(folder: Path, runtime: str, precision: str, knob: str = "prune.latency_runtime") -> LayerTable:
    """Time the layers of a probe (`write_probe`) on this machine, in a child process, and return the table of layer times.

    Args:
        folder: Folder written by `write_probe`.
        runtime: Key of `BACKENDS`.
        precision: Precision of the models for which `layers.json` gives no precision.
        knob: Name of the recipe setting that selects the runtime, for error messages.

    Raises:
        EnvironmentLacks: The runtime is not installed, or cannot run on this machine.
        CompressError: The layers could not be timed. The message states the reason.
    """
    require(runtime, knob)
    command = [sys.executable, "-m", "yolo_compress.runtime.measure.layer_times", str(folder), "--runtime", runtime,
               "--precision", precision]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompressError(f"{knob}={runtime}: timing the layers failed:\n{done.stderr.strip()[-2000:]}")
    table: LayerTable = json.loads(done.stdout.strip().splitlines()[-1])
    return table


def require(runtime: str, knob: str) -> None:
    """Check that a runtime can run on this machine.

    Raises:
        EnvironmentLacks: The runtime cannot run. The message names the recipe setting `knob` and the package to install.
    """
    lacking = BACKENDS[runtime].probe()
    if lacking:
        raise EnvironmentLacks(f"{knob}={runtime}: {lacking}")


def read_table(file: Path, imgsz_hw: tuple[int, int]) -> LayerTable:
    """Read a table of layer times that was measured on a robot.

    Raises:
        CorruptArtifact: The file is not a table of this schema.
        StorageError: The file cannot be read.
        RecipeError: There is no such file, or the layers were timed at another image size.
    """
    if not file.is_file():
        raise RecipeError(f"prune.latency_table: no file {str(file)!r}")
    table = strict_json.load(file, CorruptArtifact, "; measure it again")
    layers, whole = table.get("layers"), table.get("whole_ms")
    curves = [*layers.values(), table.get("rest")] if isinstance(layers, dict) and layers else [None]
    if (
        table.get("schema") != SCHEMA
        or not _is_number(whole)
        or not whole
        or not all(map(_is_curve, curves))
        or "imgsz" not in table
    ):
        raise CorruptArtifact(
            f"prune.latency_table: {file} is not a table of layer times of schema {SCHEMA}; measure it again"
        )
    if table["imgsz"] != list(imgsz_hw):
        raise RecipeError(
            f"prune.latency_table: {file} was measured at {table['imgsz']}, the recipe has {list(imgsz_hw)}; measure it again"
        )
    return cast(LayerTable, table)


def without_factors(table: LayerTable) -> LayerTable:
    """Return a table of layer times without the times of factors, as it is measured for channels alone."""
    layers = {name: curve for name, curve in table["layers"].items() if not is_factor(name)}
    return {**table, "layers": layers, "rest": table["rest"][: len(WIDTHS)]}


def factor_times(table: LayerTable) -> low_rank.FactorTimes:
    """Return the times of layers and factors of a table (`write_probe` with `factors`)."""
    return low_rank.FactorTimes(table, table_scale(without_factors(table)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_curve(rows: Any) -> bool:
    """Return whether a value read from JSON is a list of points (MACs, ms)."""
    points = rows if isinstance(rows, list) else []
    return bool(points) and all(isinstance(row, list) and len(row) == 2 and all(map(_is_number, row)) for row in points)


@dataclass(frozen=True)
class Rig:
    """Builds engines and times them on this machine, for one runtime, precision and image size.

    Attributes:
        folder: folder where ONNX files and engines are written.
    """

    folder: Path
    imgsz_hw: tuple[int, int]
    names: Sequence[str]
    runtime: str
    precision: str

    def build_model(self, model: nn.Module, name: str) -> Path:
        """Build an engine of a model and return the path of the engine. An engine with the same name is replaced."""
        file = self.folder / f"{name}.onnx"
        export_timed(model, file, self.imgsz_hw, self.names, self.runtime, self.precision)
        return self.build_onnx(file, name)

    def build_onnx(self, file: Path, name: str) -> Path:
        """Build an engine of an ONNX file and return the path of the engine."""
        BACKENDS[self.runtime].build(file, self.folder / name, self.precision)
        return self.folder / name

    def compare(self, engine: Path, unpruned: Path) -> Comparison:
        """Time `engine` and `unpruned` in turn and return the comparison.

        Each launch starts new processes. Launches are repeated until the ratio of the two times is precise enough (`SETTLED`).
        """
        specs: list[Spec] = [{"label": path.name, "engine": str(path)} for path in (engine, unpruned)]
        least, most = LAUNCHES
        ratios: list[float] = []
        unpruned_ms = np.inf
        while len(ratios) < least or (len(ratios) < most and _standard_error(ratios) > SETTLED):
            results = measure_in_turn(specs, ROUNDS, SAMPLES)
            own_R, unpruned_R = (np.array([np.median(taken) for taken in one["rounds_ms"]]) for one in results)
            ratios.append(float(np.median(own_R / unpruned_R)))
            unpruned_ms = min(unpruned_ms, float(unpruned_R.min()))
        return Comparison(float(np.median(ratios)), unpruned_ms)

    def fastest_ms(self, engine: Path) -> float:
        """Time `engine` in several rounds and return the smallest median of a round in ms.

        The smallest value is the best estimate, since other load on the machine only makes rounds slower.
        """
        spec: Spec = {"label": engine.name, "engine": str(engine)}
        launches = [measure_in_turn([spec], ROUNDS, SAMPLES)[0]["rounds_ms"] for _ in range(LAUNCHES[0])]
        return min(float(np.median(taken)) for rounds in launches for taken in rounds)


@dataclass(frozen=True)
class Comparison:
    """Latency of a model relative to the unpruned model.

    Other load on the machine makes rounds two to four times slower, and rarely for both models alike. The fastest rounds of the two
    models can therefore not be compared. Two neighbouring rounds, one of each model, are slowed alike.

    Attributes:
        share: latency of the model divided by the latency of the unpruned model. Each launch has a value: the median ratio of
            neighbouring rounds. The share is the median of these values.
        unpruned_ms: smallest median of a round of the unpruned model in ms.
    """

    share: float
    unpruned_ms: float


def _standard_error(ratios: Sequence[float]) -> float:
    """Return the relative standard error of the median of `ratios`. A single outlier hardly changes this error.

    The error is computed from the median absolute deviation. For normal noise, the factor 1.48 converts this deviation to a
    standard deviation. The factor 1.25 converts the standard error of a mean to the standard error of a median.
    """
    middle = np.median(ratios)
    deviation = np.median(np.abs(np.array(ratios) - middle))
    return float(1.25 * 1.48 * deviation / np.sqrt(len(ratios)) / middle)


@dataclass(frozen=True)
class Hit(Generic[P]):
    """The plan that `hit` found for a latency limit, and the measured latencies.

    Attributes:
        asked_ms: latency limit that the planner got for `plan`, on the scale of the layer times.
        measured_ms: measured latency of the pruned model.
        unpruned_ms: measured latency of the unpruned model.
        plan: what stays.
    """

    asked_ms: float
    measured_ms: float
    unpruned_ms: float
    plan: P


def hit(
    model: nn.Module,
    planner: Callable[[float], P],
    limit_ms: float,
    table_ms: float,
    rig: Rig,
    unpruned: Path,
    say: Callable[[str], None],
    apply: Callable[[nn.Module, P], None],
) -> Hit[P]:
    """Find the plan for which the measured latency of the pruned model is `limit_ms`.

    Each pruned model is built and timed. The layer times predict relative latencies better than absolute ones. The limit that is
    passed to `planner` is therefore adjusted after each measurement, by interpolation between the nearest results below and above
    `limit_ms`.

    Args:
        model: Model to prune. It is not changed.
        planner: Function that returns the plan for a limit in ms, as estimated from the layer times.
        limit_ms: Latency to reach.
        table_ms: Latency of the unpruned model according to the table of layer times.
        rig: Builds and times models.
        unpruned: Engine of the unpruned model, built by `rig`.
        say: Function to call with one line of text after each timed model.
        apply: Function that makes the model of a plan, in place.

    Raises:
        CompressError: No pruned model came within `TOLERANCE` of the limit.
        RecipeError: The limit cannot be reached, or the unpruned model already meets it.
    """
    unpruned_ms = min(table_ms, rig.fastest_ms(unpruned))  # a table measured under load can be several times too slow
    if limit_ms >= unpruned_ms:
        raise RecipeError(
            f"prune: latency_ms={limit_ms:g} is already met: the unpruned model takes {unpruned_ms:.3g} ms; set a smaller limit"
        )
    limit_for_table = limit_ms / unpruned_ms * table_ms
    tried: list[tuple[float, float, P]] = []  # (limit for `planner`, ratio to the unpruned model, plan)
    while len(tried) < TRIES:
        try:
            plan = planner(limit_for_table)
        except RecipeError:
            if not tried:
                raise
            break  # there is no narrower model
        candidate = copy.deepcopy(model)
        apply(candidate, plan)
        comparison = rig.compare(rig.build_model(candidate, "candidate"), unpruned)
        unpruned_ms = min(unpruned_ms, comparison.unpruned_ms)
        tried.append((limit_for_table, comparison.share, plan))
        measured = unpruned_ms * comparison.share
        say(f"prune: {plan.kept_flops:.1%} of the MACs take {measured:.2f} ms on {rig.runtime}, target {limit_ms:g} ms")
        if abs(measured / limit_ms - 1) <= CLOSE_ENOUGH:
            break
        limit_for_table = _next_limit(
            limit_ms, (unpruned_ms, table_ms), [(unpruned_ms * share, one) for one, share, _ in tried]
        )
    hits = [Hit(one, unpruned_ms * share, unpruned_ms, plan) for one, share, plan in tried]
    best = min(hits, key=lambda one: abs(one.measured_ms / limit_ms - 1))
    off = abs(best.measured_ms / limit_ms - 1)
    if off > TOLERANCE:
        raise CompressError(
            f"prune: latency_ms={limit_ms:g} was missed by {off:.0%} in {len(tried)} tries (nearest {best.measured_ms:.2f} ms on "
            f"{rig.runtime}); stop other programs, or set a smaller prune.round_to"
        )
    return best


def _next_limit(limit_ms: float, unpruned: tuple[float, float], tried: Sequence[tuple[float, float]]) -> float:
    """Return the next latency limit for the planner. It is interpolated between the two nearest results, one too fast and one too slow.

    Args:
        limit_ms: Latency to reach.
        unpruned: (measured ms, ms according to the layer times) of the unpruned model, the first slow result.
        tried: (measured ms, limit passed to the planner in ms) of each timed model. If none was fast enough, (0, 0) is used as
            the fast result.
    """
    slow = min((pair for pair in tried if pair[0] > limit_ms), default=unpruned)
    fast = max((pair for pair in tried if pair[0] <= limit_ms), default=(0.0, 0.0))
    if slow[0] <= fast[0]:
        return slow[1]
    return fast[1] + (slow[1] - fast[1]) * (limit_ms - fast[0]) / (slow[0] - fast[0])
