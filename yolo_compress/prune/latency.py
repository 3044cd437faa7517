"""Milliseconds as a budget: the network at several widths for a table of layer times, and the plan that hits the limit.

The table (`runtime.measure.layer_times`) decides which widths are tried; the finished network, built and timed against the dense one in
turn, decides whether they are right. Shares of the dense time are compared, so that a machine that slows down between two
measurements does not move the budget.

Widths stay in steps of `round_to` to the end. They are fine enough: some forty groups take them apart from each other, and
YOLOv8n's MACs are met within 0.1 % in steps of 16. Finer ones would be no finer in time, as vectors are filled up to 16.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import nn

from yolo_compress.errors import CompressError, CorruptArtifact, EnvironmentLacks, RecipeError
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.files import strict_json
from yolo_compress.files.atomic import atomic_write
from yolo_compress.nets import detect
from yolo_compress.prune.budget import Plan
from yolo_compress.prune.cost import conv_shapes
from yolo_compress.prune.graph import Group, prunable, prune
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.layer_times import LAYERS, SCHEMA, LayerTable
from yolo_compress.runtime.measure.messages import Spec

WIDTHS = (1.0, 0.75, 0.5, 0.25)
DENSE = "100.onnx"  # the first of them
TOLERANCE = 0.05  # of the limit, on the finished network; what the recipe promises
CLOSE_ENOUGH = 0.02  # of the limit; leaves three standard errors of the share to the tolerance
TRIES = 6
ROUNDS, SAMPLES = 6, 15  # of a launch; short, so that other work on the machine meets both neighbours or neither
LAUNCHES = (5, 12)  # of a comparison with the dense network: at least, and at most until the median is `SETTLED`
SETTLED = 0.01  # standard error of the share, relative

Planner = Callable[[float], Plan]  # the plan for a limit in milliseconds by the table


def write_probe(model: nn.Module, folder: Path, imgsz_hw: tuple[int, int], names: Sequence[str], round_to: int) -> None:
    """Write the network at `WIDTHS` as ONNX, and what `runtime.measure.layer_times` needs to read its layers' times.

    Args:
        model: stock model, not changed; the first channels of each group stay, as no time depends on which.
        folder: made if missing.
        imgsz_hw: height and width in pixels.
        names: class names.
        round_to: widths are multiples of this, as those of plans made with the table will be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    networks = []
    nodes: dict[str, str] = {}
    for width in WIDTHS:
        narrow = copy.deepcopy(model)
        if width < 1:
            groups = prunable(narrow)
            prune(narrow, {group.name: torch.arange(_narrowed(group, width, round_to)) for group in groups})
        file = f"{round(100 * width):03d}.onnx"
        export_onnx(narrow, folder / file, imgsz_hw, names=names)
        shapes = conv_shapes(narrow, imgsz_hw)
        networks.append({"file": file, "macs": {name: shape.macs for name, shape in shapes.items()}})
        nodes = nodes or places(folder / file, shapes)
    described = {"networks": networks, "nodes": nodes, "imgsz": list(imgsz_hw)}
    atomic_write(folder / LAYERS, json.dumps(described) + "\n")


def _narrowed(group: Group, width: float, round_to: int) -> int:
    unit = min(round_to, group.unit)
    return max(1, round(width * group.width / unit)) * unit


def places(file: Path, convs: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Convolution -> the part of a node's name that it and its activation share."""
    found: dict[str, str] = {}
    for node in onnx.load(str(file)).graph.node:
        name = node.input[1].removesuffix(".weight") if node.op_type == "Conv" else ""
        if name in convs:
            found[name] = node.name.removesuffix("conv/Conv")
    for name in convs:
        if place := detect.exported_prefix(name):
            found[name] = place
    missing = [name for name in convs if name not in found]
    if missing:
        raise CompressError(f"{file}: no node computes {missing[0]}; the layer times cannot be told apart")
    return found


def take_table(folder: Path, runtime: str, precision: str, asked: str = "prune.latency_runtime") -> LayerTable:
    """Time the layers of a probe here, in a process of its own.

    Args:
        folder: from `write_probe`.
        runtime: key of `BACKENDS`.
        precision: of the networks that have none of their own.
        asked: the knob that names the runtime, for errors.

    Raises:
        EnvironmentLacks: the runtime is not installed, or cannot run here.
        CompressError: the layers could not be timed; carries the reason.
    """
    require(runtime, asked)
    command = [sys.executable, "-m", "yolo_compress.runtime.measure.layer_times", str(folder), "--runtime", runtime,
               "--precision", precision]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompressError(f"{asked}={runtime}: timing the layers failed:\n{done.stderr.strip()[-2000:]}")
    table: LayerTable = json.loads(done.stdout.strip().splitlines()[-1])
    return table


def require(runtime: str, asked: str) -> None:
    """Refuse a runtime that cannot time anything here.

    Raises:
        EnvironmentLacks: names the knob `asked`, and what to install.
    """
    lacking = BACKENDS[runtime].probe()
    if lacking:
        raise EnvironmentLacks(f"{asked}={runtime}: {lacking}")


def read_table(file: Path, imgsz_hw: tuple[int, int]) -> LayerTable:
    """A table taken on the robot.

    Raises:
        CorruptArtifact: not a table of this schema.
        StorageError: it cannot be read.
        RecipeError: no such file, or taken at another image size.
    """
    if not file.is_file():
        raise RecipeError(f"prune.latency_table: no file {str(file)!r}")
    table = strict_json.load(file, CorruptArtifact, "; measure it again")
    layers, whole = table.get("layers"), table.get("whole_ms")
    curves = [*layers.values(), table.get("rest")] if isinstance(layers, dict) and layers else [None]
    if (
        table.get("schema") != SCHEMA
        or not _number(whole)
        or not whole
        or not all(map(_curve, curves))
        or "imgsz" not in table
    ):
        raise CorruptArtifact(f"prune.latency_table: {file} is no table of layer times of schema {SCHEMA}")
    if table["imgsz"] != list(imgsz_hw):
        raise RecipeError(f"prune.latency_table: {file} was taken at {table['imgsz']}, the recipe has {list(imgsz_hw)}")
    return cast(LayerTable, table)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _curve(rows: Any) -> bool:
    """Whether these are points (MACs, ms) of a curve."""
    points = rows if isinstance(rows, list) else []
    return bool(points) and all(isinstance(row, list) and len(row) == 2 and all(map(_number, row)) for row in points)


@dataclass(frozen=True)
class Rig:
    """What builds and times networks: one runtime on this machine."""

    folder: Path
    imgsz_hw: tuple[int, int]
    names: Sequence[str]
    runtime: str
    precision: str

    def engine(self, model: nn.Module, name: str) -> Path:
        """The model as an engine; one of that name is replaced."""
        file = self.folder / f"{name}.onnx"
        export_onnx(model, file, self.imgsz_hw, names=self.names)
        return self.built(file, name)

    def built(self, file: Path, name: str) -> Path:
        """An ONNX file as an engine."""
        BACKENDS[self.runtime].build(file, self.folder / name, self.precision)
        return self.folder / name

    def compare(self, engine: Path, dense: Path) -> Comparison:
        """Time `engine` and `dense` in turn, each launch in processes of its own, until their ratio is known."""
        specs: list[Spec] = [{"label": path.name, "engine": str(path)} for path in (engine, dense)]
        least, most = LAUNCHES
        ratios: list[float] = []
        dense_ms = np.inf
        while len(ratios) < least or (len(ratios) < most and _error(ratios) > SETTLED):
            results = measure_in_turn(specs, ROUNDS, SAMPLES)
            own_R, dense_R = (np.array([np.median(taken) for taken in one["rounds_ms"]]) for one in results)
            ratios.append(float(np.median(own_R / dense_R)))
            dense_ms = min(dense_ms, float(dense_R.min()))
        return Comparison(float(np.median(ratios)), dense_ms)

    def quietest(self, engine: Path) -> float:
        """Milliseconds of `engine` alone: the lowest of the medians of rounds, as other work only ever makes one slower."""
        spec: Spec = {"label": engine.name, "engine": str(engine)}
        launches = [measure_in_turn([spec], ROUNDS, SAMPLES)[0]["rounds_ms"] for _ in range(LAUNCHES[0])]
        return min(float(np.median(taken)) for rounds in launches for taken in rounds)


@dataclass(frozen=True)
class Comparison:
    """A network's time beside the dense one's.

    Other work makes rounds two to four times slower, and seldom those of both networks alike, so the lowest of each are
    no pair. Neighbouring rounds are slowed alike.

    Attributes:
        share: of the dense time; the median over launches of the median over pairs of neighbouring rounds.
        dense_ms: the lowest of the medians of rounds, as other work only ever makes one slower.
    """

    share: float
    dense_ms: float


def _error(ratios: Sequence[float]) -> float:
    """Standard error of the median, relative to it; from the median deviation, which one odd launch does not move.

    1.25 makes the error of a mean one of a median, 1.48 a median deviation a standard one, both for normal noise.
    """
    middle = np.median(ratios)
    deviation = np.median(np.abs(np.array(ratios) - middle))
    return float(1.25 * 1.48 * deviation / np.sqrt(len(ratios)) / middle)


@dataclass(frozen=True)
class Hit:
    """What was asked of the table in the end, the times of the finished and of the dense network, and the plan."""

    asked_ms: float
    measured_ms: float
    dense_ms: float
    plan: Plan


def hit(
    model: nn.Module,
    planner: Planner,
    limit_ms: float,
    table_ms: float,
    rig: Rig,
    dense: Path,
    say: Callable[[str], None],
) -> Hit:
    """The plan whose network, built and timed, takes `limit_ms`.

    The table is a model of the machine and knows the shape of the answer better than its height: what is asked of it is
    moved until the finished network is right, between the nearest misses on both sides once there are such.

    Args:
        model: what the plans are for; not changed.
        planner: limit in ms by the table -> plan.
        limit_ms: what is asked.
        table_ms: what the dense network takes by the table.
        rig: builds and times.
        dense: engine of the dense network, from `rig`.
        say: takes one line a try.

    Raises:
        CompressError: no try came within `TOLERANCE`; says how close.
        RecipeError: the limit cannot be reached, or the dense network is within it.
    """
    dense_ms = min(table_ms, rig.quietest(dense))  # beside other work a table says several times what a network takes
    if limit_ms >= dense_ms:
        raise RecipeError(
            f"prune: latency_ms={limit_ms:g} asks for nothing: the network as it is takes {dense_ms:.3g} ms"
        )
    asked = limit_ms / dense_ms * table_ms
    tried: list[tuple[float, float, Plan]] = []  # asked of the table, share of the dense time, plan
    while len(tried) < TRIES:
        try:
            plan = planner(asked)
        except RecipeError:
            if not tried:
                raise
            break  # the table has no narrower network to offer
        candidate = copy.deepcopy(model)
        prune(candidate, plan.keep)
        seen = rig.compare(rig.engine(candidate, "candidate"), dense)
        dense_ms = min(dense_ms, seen.dense_ms)
        tried.append((asked, seen.share, plan))
        measured = dense_ms * seen.share
        say(f"prune: {plan.kept_flops:.1%} of the MACs take {measured:.2f} ms on {rig.runtime}, {limit_ms:g} ms asked")
        if abs(measured / limit_ms - 1) <= CLOSE_ENOUGH:
            break
        asked = _next(limit_ms, (dense_ms, table_ms), [(dense_ms * share, one) for one, share, _ in tried])
    hits = [Hit(one, dense_ms * share, dense_ms, plan) for one, share, plan in tried]
    found = min(hits, key=lambda one: abs(one.measured_ms / limit_ms - 1))
    off = abs(found.measured_ms / limit_ms - 1)
    if off > TOLERANCE:
        raise CompressError(
            f"prune: latency_ms={limit_ms:g} was missed by {off:.0%} in {len(tried)} tries (nearest {found.measured_ms:.2f} ms on "
            f"{rig.runtime}); the machine may be busy, or prune.round_to too coarse"
        )
    return found


def _next(limit_ms: float, dense: tuple[float, float], tried: Sequence[tuple[float, float]]) -> float:
    """What to ask next, from (measured, asked) pairs: on the line between the nearest too fast and the nearest too slow.

    The dense network stands in for a slow one and a network of no time for a fast one, until such were measured.
    """
    slow = min((pair for pair in tried if pair[0] > limit_ms), default=dense)
    fast = max((pair for pair in tried if pair[0] <= limit_ms), default=(0.0, 0.0))
    if slow[0] <= fast[0]:
        return slow[1]
    return fast[1] + (slow[1] - fast[1]) * (limit_ms - fast[0]) / (slow[0] - fast[0])
