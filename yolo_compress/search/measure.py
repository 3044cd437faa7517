"""What a trial measures: the retention with its interval, and the latency of an engine, timed alone on the machine."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from yolo_compress import home, progress
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.ab.comparison import MIN_IMAGES
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.bootstrap import interval
from yolo_compress.evaluate.coco import absolute_boxes, mean_ap
from yolo_compress.evaluate.latency_inputs import write_inputs
from yolo_compress.files.lock import lock
from yolo_compress.recipe.recipe import BenchConfig, Recipe
from yolo_compress.report.intervals import REPLICATES, resampled
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.max_detections import counted
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.messages import Spec
from yolo_compress.runtime.registry import RUNTIMES

ATTEMPTS = 3  # timings of an engine until no other program disturbed one
DETECTIONS = "detections.npy"  # in the artefact of every stage with a model


class Retained(NamedTuple):
    """mAP50-95 of a model relative to that of the baseline, with the 95 % interval of the paired bootstrap over images."""

    map50_95: float
    retention: float
    low: float | None  # None: fewer than `MIN_IMAGES` images have objects
    high: float | None


class Timing(NamedTuple):
    p50_ms: float
    quiet: bool  # whether other programs were idle


def retained(dataset: Dataset, recipe: Recipe, baseline: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Retained:
    """Compare the detections of a model with those of the baseline on the validation images.

    Args:
        dataset: Data with the ground truth.
        recipe: Its seed is that of the resamples.
        baseline, found: Detections of each image: (N, 6) array, columns x1, y1, x2, y2 in px, score, class.

    Raises:
        RecipeError: The baseline's mAP is 0.
    """
    truths, most = [absolute_boxes(sample) for sample in dataset.val], counted(recipe.data.max_det)
    first, second = (mean_ap(dataset.val, one, dataset.names, most)["map50_95"] for one in (baseline, found))
    if first <= 0:
        raise RecipeError(
            "the baseline's mAP50-95 is 0, so no share of it can be kept: train it longer, or give weights that know your classes"
        )
    low, high = None, None
    if sum(len(rows) > 0 for rows in truths) >= MIN_IMAGES:
        models = {"baseline": baseline, "model": found}
        map_R = resampled(truths, models, len(dataset.names), REPLICATES, recipe.run.seed, most)
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(map_R["model"] / map_R["baseline"])
    return Retained(second, second / first, low, high)


def detections(dataset: Dataset, recipe: Recipe, engine: Path) -> list[np.ndarray]:
    """Return what an engine detects in the validation images."""
    config = recipe.bench or BenchConfig()
    threads = config.threads if RUNTIMES[engine.name.partition("-")[0]].takes_threads else None
    with open_engine(str(engine), threads=threads) as backend:
        found = accuracy(backend, dataset.val, dataset.names, recipe.data.imgsz_hw, max_det=recipe.data.max_det)
    return found["detections"]


def timed(engine: Path, dataset: Dataset, recipe: Recipe, settings: BenchConfig, scratch: Path) -> Timing:
    """Time an engine while no trial of this machine trains. If other programs disturb it, wait and time it again, at most twice.

    Args:
        engine: Folder of the engine. Its name is `<runtime>-<precision>`.
        dataset: The engine is timed on its first validation images.
        recipe: Image size, and images of one inference.
        settings: Iterations, rounds, warm-up and threads.
        scratch: Folder for the input images.
    """
    runtime = engine.name.partition("-")[0]
    batch = recipe.export.batch if recipe.export else 1
    inputs = scratch / "inputs.npy"
    write_inputs(inputs, dataset.val, recipe.data.imgsz_hw, batch)
    threads = settings.threads if RUNTIMES[runtime].takes_threads else None
    spec: Spec = {
        "label": engine.name, "engine": str(engine), "inputs": str(inputs), "warmup_n": settings.warmup, "batch": batch,
        "threads": threads,
    }  # fmt: skip
    best: Timing | None = None
    with alone():
        for attempt in range(ATTEMPTS):
            started = time.monotonic()
            (result,) = measure_in_turn([spec], settings.rounds, -(-settings.iterations // settings.rounds))
            found = Timing(float(np.median(result["samples_ms"])), result["quiet"])
            if best is None or (found.quiet, -found.p50_ms) > (best.quiet, -best.p50_ms):
                best = found
            if best.quiet:
                break
            if attempt < ATTEMPTS - 1:
                progress.say("search: other programs use the processors; waiting, then timing again")
                time.sleep(max(1.0, time.monotonic() - started))
    assert best is not None
    if not best.quiet:
        progress.say(
            f"search: other programs used the processors while {engine.name} was timed; its latency may be too high"
        )
    return best


@contextmanager
def beside_others() -> Iterator[None]:
    """Hold the machine for work that may run beside that of other trials, such as a training, but not beside a timing."""
    with lock(_gate(), "search: waiting to train", quietly=True):  # a timing that waits for the machine keeps this
        held = lock(_machine(), "search: a training", shared=True, quietly=True)
        held.__enter__()
    try:
        yield
    finally:
        held.__exit__(None, None, None)


@contextmanager
def alone() -> Iterator[None]:
    """Hold the machine for a timing: no trial of any study in `searches/` trains on it meanwhile. New trainings wait."""
    with (
        lock(_gate(), "search: waiting to time an engine", quietly=True),
        lock(_machine(), "search: the timing of an engine", quietly=True),
    ):
        yield


def _machine() -> Path:
    return home.searches() / ".machines" / f"{socket.gethostname()}.lock"


def _gate() -> Path:
    return _machine().with_suffix(".gate")
