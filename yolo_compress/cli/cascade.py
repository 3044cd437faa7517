"""`yolo-compress cascade`: fit a router between a small and a large model, and test whether the two beat a static choice."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_compress import home, progress
from yolo_compress.cli.grammar import Command
from yolo_compress.data.dataset import Dataset, Sample, load
from yolo_compress.errors import DataError, RecipeError
from yolo_compress.evaluate.ab.comparison import MIN_IMAGES
from yolo_compress.evaluate.ab.contender import Engine, open_contender
from yolo_compress.evaluate.cascade.choose import choose
from yolo_compress.evaluate.cascade.collect import Collected, collect, times
from yolo_compress.evaluate.cascade.document import Entrant, judged
from yolo_compress.evaluate.cascade.gain import Mixes, gains
from yolo_compress.evaluate.cascade.router import fit
from yolo_compress.evaluate.cascade.schema import CascadeDocument, Demand
from yolo_compress.evaluate.cascade.timed_images import timed_images
from yolo_compress.evaluate.cascade.write import fill, policy_json, publish
from yolo_compress.recipe.messages import got
from yolo_compress.report.as_text import text_table
from yolo_compress.report.numbers import percent
from yolo_compress.report.tables.cascade import cascade_table
from yolo_compress.runtime.backends.base import load_info
from yolo_compress.runtime.detect.cascade import read_policy
from yolo_compress.runtime.engine import open_engine
from yolo_compress.runtime.measure.messages import Measured

FIT_IMAGES, FIT_LEAST = 1000, 40  # training images of the fit: at most, evenly spaced, and at least
TIMED_IMAGES = 64  # validation images that are timed, held in memory by each measuring process
WIDTH = 100  # columns of the table
FIRST_ROUNDS, FIRST_SAMPLES = 2, 50  # for the choice of the threshold
ROUNDS, SAMPLES = 4, 200  # for the result: p99 needs 662 samples


@dataclass(frozen=True)
class Settings:
    """Options of one call of `cascade`. At most one of `latency_ms` and `max_drop` is not None."""

    small: str
    large: str
    data: str
    out: Path
    static: str | None = None
    latency_ms: float | None = None
    max_drop: float | None = None
    replicates: int = 1000
    seed: int = 0
    force: bool = False

    @property
    def demand(self) -> Demand:
        return {"latency_ms": self.latency_ms, "max_drop": self.max_drop}


def handle(command: Command) -> int:
    """Fit and judge a cascade, and write its policy folder if it wins. Return exit code 1 unless it is recommended."""
    chosen = settings(command.options)
    document = run(chosen)
    progress.result(text(document))
    progress.result(json.dumps({**document, "out": str(chosen.out) if chosen.out.exists() else None}))
    return 0 if document["verdict"]["status"] == "pass" else 1


def settings(options: Mapping[str, str]) -> Settings:
    """Read the options of the command line.

    Raises:
        RecipeError: A value is out of range, both demands are given, `out` exists, or its parent folder does not.
    """
    if "latency_ms" in options and "max_drop" in options:
        raise RecipeError("command line: latency_ms and max_drop are both given; give one, the other follows from it")
    out = Path(options["out"])
    if out.exists() or out.is_symlink() or not out.parent.is_dir():
        raise RecipeError(f"command line: out: got {got(options['out'])}, expected a new name in a folder that exists")
    return Settings(
        options["small"],
        options["large"],
        options["data"],
        out,
        options.get("static"),
        _number(options, "latency_ms", "a number above 0", lambda value: value > 0),
        _number(options, "max_drop", "a number >= 0 and < 1", lambda value: 0 <= value < 1),
        _whole(options, "replicates", Settings.replicates, 1, 100_000),
        _whole(options, "seed", Settings.seed, 0, 2**32 - 1),
        options.get("force") == "true",
    )


def _number(options: Mapping[str, str], key: str, expected: str, allowed: Any) -> float | None:
    if key not in options:
        return None
    try:
        value = float(options[key])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and allowed(value)):
        raise RecipeError(f"command line: {key}: got {got(options[key])}, expected {expected}")
    return value


def _whole(options: Mapping[str, str], key: str, default: int, low: int, high: int) -> int:
    text = options.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and low <= int(text) <= high):
        raise RecipeError(f"command line: {key}: got {got(text)}, expected a whole number from {low} to {high}")
    return int(text)


def run(chosen: Settings) -> CascadeDocument:
    """Fit and judge a cascade, and return the cascade document.

    The router is fitted to training images. All figures are on validation images. The policy folder is written if the cascade is
    recommended, or if `force` is set and there is a cascade.

    Raises:
        RecipeError: An engine is not one, classes differ, or the latencies leave nothing to a cascade.
        DataError: There are too few images, or images without objects only.
        CompressError, EngineError, RuntimeUnavailable, LatencyError: Other errors that a user can fix.
    """
    with tempfile.TemporaryDirectory(prefix="yolo_compress_cascade_") as name:
        scratch = Path(name)
        entrants = open_entrants(chosen, scratch)
        data = _data(chosen.data, entrants[0].info.names)
        first = _times(
            [*entrants[:2]], [one.image for one in _spread(data.val, TIMED_IMAGES)], FIRST_ROUNDS, FIRST_SAMPLES
        )
        small_ms, large_ms = (float(np.mean(one["samples_ms"])) for one in first)
        check_latencies(small_ms, large_ms, chosen.latency_ms)
        fitted_to = _collect("fit", entrants[:2], _spread(data.train, FIT_IMAGES))
        held_out = _collect("validate", entrants, data.val)
        mixes = Mixes.of(fitted_to.truths, fitted_to.found[0], fitted_to.found[1], len(data.names))
        gain_I = gains(mixes)
        router = fit(fitted_to.features_IF, gain_I, chosen.seed)
        choice = choose(router, fitted_to.features_IF, mixes, small_ms, large_ms, chosen.demand, chosen.seed)
        handed_I, folder = np.zeros(len(data.val), bool), scratch / "policy"
        if choice is not None:
            small, large = entrants[:2]
            policy = policy_json(small.info, large.info, router.weights_F, router.bias, choice.threshold)
            fill(folder, policy, (small.folder, small.info), (large.folder, large.info))
            margin_of = read_policy(folder).margin_of
            handed_I = np.array([margin_of(features_F) > 0 for features_F in held_out.features_IF])
        timed = timed_images(handed_I, TIMED_IMAGES)
        images = [data.val[index].image for index in timed]
        measured = _times(entrants, images, ROUNDS, SAMPLES, folder if choice is not None else None)
        document = judged(
            entrants,
            data,
            router,
            choice,
            gain_I,
            held_out,
            handed_I,
            timed,
            measured,
            chosen.demand,
            chosen.replicates,
            chosen.seed,
        )
        if choice is not None and (chosen.force or document["verdict"]["status"] == "pass"):
            publish(folder, chosen.out, document)
    return document


def open_entrants(chosen: Settings, scratch: Path) -> list[Entrant]:
    """Open the engines of the command line: small, large, and static if it is given.

    Raises:
        RecipeError: one is no engine, classes differ, or small and large are the same model.
        EngineError: the files of an engine are damaged.
    """
    entrants: list[Entrant] = []
    for name, label in (("small", chosen.small), ("large", chosen.large), ("static", chosen.static)):
        if label is None:
            continue
        if Path(label).suffix == ".pt":
            raise RecipeError(
                f"{name}={label}: a checkpoint, but a cascade needs engines; run `yolo-compress engine` first"
            )
        (scratch / name).mkdir()
        opened = open_contender(label, scratch / name)
        if not isinstance(opened, Engine):
            raise RecipeError(
                f"{name}={label}: a row of a bench, but a cascade needs engines; give an engine folder or .onnx"
            )
        entrants.append(Entrant(name, label, opened.folder, load_info(opened.folder)))
    small = entrants[0]
    for other in entrants[1:]:
        if other.info.names != small.info.names:
            raise RecipeError(
                f"{other.name}={other.label} has classes {got(list(other.info.names))}, {small.label} has "
                f"{got(list(small.info.names))}; a cascade needs two models of the same classes in the same order"
            )
    if _identity(small) == _identity(entrants[1]):
        raise RecipeError(f"small and large are the same model ({small.label}, {entrants[1].label}); give two")
    return entrants


def _identity(one: Entrant) -> tuple[str, str, str]:
    return one.info.runtime, one.info.precision, one.info.onnx_sha256


def _data(name: str, names: Sequence[str]) -> Dataset:
    """Load the data set: training images for the fit, and validation images that are not among them.

    Raises:
        RecipeError: the classes are not those of the engines.
        DataError: there are too few images, or validation images are training images too.
    """
    cache = home.weights() / ".cache" / "data" if home.weights().is_dir() else None
    data = load(name, on_bad="skip", cache=cache)
    if tuple(data.names) != tuple(names):
        raise RecipeError(f"the models' classes are {got(list(names))}, those of {name} are {got(list(data.names))}")
    for note in [*data.skipped, *data.notes]:
        progress.notice(f"data: {note}")
    for what, samples, least, why in (
        ("training images with objects", _spread(data.train, FIT_IMAGES), FIT_LEAST, "a router needs at least"),
        ("validation images with objects", data.val, MIN_IMAGES, "an interval of the difference needs at least"),
    ):
        with_objects = sum(bool(sample.boxes) for sample in samples)
        if with_objects < least:
            raise DataError(f"{name}: {with_objects} {what}, {why} {least}")
    return data


def check_latencies(small_ms: float, large_ms: float, latency_ms: float | None) -> None:
    """Check that the measured mean latencies leave something to a cascade.

    Raises:
        RecipeError: the large model is not slower than the small one. Or `latency_ms` is not between the two.
    """
    if large_ms <= small_ms:
        raise RecipeError(
            f"large takes {large_ms:.2f} ms an image and small {small_ms:.2f} ms: large has to be the slower model; exchange them, or "
            "use the one with the higher mAP alone"
        )
    if latency_ms is not None and latency_ms <= small_ms:
        raise RecipeError(
            f"latency_ms={latency_ms:g}: small alone takes {small_ms:.2f} ms an image, and a cascade takes longer"
        )
    if latency_ms is not None and latency_ms >= large_ms:
        raise RecipeError(
            f"latency_ms={latency_ms:g}: large alone takes {large_ms:.2f} ms an image, so no cascade is needed; use large alone"
        )


def _spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most `most` samples, evenly spaced."""
    count = min(most, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def _collect(what: str, entrants: Sequence[Entrant], samples: Sequence[Sample]) -> Collected:
    opened = []
    try:
        opened += [open_engine(one.folder) for one in entrants]
        with progress.bar(f"cascade: {what}", len(samples), "image") as advance:
            return collect(opened, samples, advance)
    finally:
        for one in opened:
            one.__exit__(None, None, None)


def _times(
    entrants: Sequence[Entrant], images: Sequence[Path], rounds: int, samples: int, policy: Path | None = None
) -> list[Measured]:
    folders, labels = [one.folder for one in entrants], [one.label for one in entrants]
    if policy is not None:
        folders, labels = [*folders, policy], [*labels, "cascade"]
    with progress.bar("cascade: latency", rounds * len(folders), "round") as advance:
        return times(folders, labels, images, rounds, samples, advance)


def text(document: CascadeDocument) -> str:
    """Return the result as text: the verdict, a table of the models and the cascade, and what the router does."""
    router, own = document["router"], document["cascade"]
    notes = [
        f"The router explains {percent(router['explained'])} of the variance of the gain in training images that it was not fitted "
        f"to ({router['images']} images)."
    ]
    if own is not None:
        notes.append(
            f"The small model alone was expected to be enough for {percent(own['expected_kept'])} of the images. An image that needs "
            "both models takes about the sum of their latencies, which p99 shows."
        )
    if not document["quiet"]:
        notes.append("Other programs used the processors while latencies were measured.")
    return "\n".join([document["verdict"]["line"], "", text_table(cascade_table([document]), WIDTH), "", *notes])
