"""`yolo-compress ab`: is model B as good as model A? Both run on the same images, or a bench has already measured them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yolo_compress import home, progress
from yolo_compress.cli.grammar import Command
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.ab.comparison import compare
from yolo_compress.evaluate.ab.contender import Cascade, Checkpoint, Contender, Measured, one_size, open_contender
from yolo_compress.evaluate.ab.latency_ratio import Rounds
from yolo_compress.evaluate.ab.schema import AB, Side
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.evaluate.latency_inputs import write_inputs
from yolo_compress.files.atomic import atomic_write
from yolo_compress.recipe.messages import got
from yolo_compress.report.numbers import fixed, signed, three_digits, times
from yolo_compress.runtime.measure import end_to_end
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.messages import Spec

ROUNDS, SAMPLES = 4, 50  # of each engine; an even number of rounds cancels drift
END_TO_END_IMAGES = SAMPLES  # a cascade's latency depends on the image; each is timed once a round


@dataclass(frozen=True)
class Settings:
    """Options of one call of `ab`. If `imgsz` is None, the engine or bench sets the image size."""

    a: str
    b: str
    data: str
    imgsz: tuple[int, int] | None = None
    conf: float = 0.25
    margin: float = 0.01
    replicates: int = 1000
    seed: int = 0
    out: Path | None = None


def handle(command: Command) -> int:
    """Compare model A, which is in use, with the new model B. Return exit code 1 unless model B passes."""
    document = run(settings(command.options))
    progress.result(text(document))
    progress.result(json.dumps(document))
    return 0 if document["verdict"]["status"] == "pass" else 1


def settings(options: Mapping[str, str]) -> Settings:
    """Read the options of the command line.

    Raises:
        RecipeError: A value is out of range, or the folder of `out` does not exist.
    """
    out = Path(options["out"]) if "out" in options else None
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise RecipeError(f"command line: out: got {got(options['out'])}, expected a file in a folder that exists")
    return Settings(
        options["a"],
        options["b"],
        options["data"],
        _size(options.get("imgsz")),
        _number(options, "conf", Settings.conf, float, 0, 1),
        _number(options, "margin", Settings.margin, float, 0, 1),
        _number(options, "replicates", Settings.replicates, int, 1, 100_000),
        _number(options, "seed", Settings.seed, int, 0, 2**32 - 1),
        out,
    )


def _number(options: Mapping[str, str], key: str, default: Any, kind: Callable[[str], Any], low: int, high: int) -> Any:
    text = options.get(key, str(default))
    try:
        value = kind(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        what = "whole number" if kind is int else "number"
        raise RecipeError(f"command line: {key}: got {got(text)}, expected a {what} from {low} to {high}")
    return value


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = [int(side) for side in text.split(",") if side.isascii() and side.isdigit() and len(side) < 6]
    if len(sides) not in (1, 2) or len(sides) != text.count(",") + 1 or any(side % 32 or not side for side in sides):
        raise RecipeError(
            f"command line: imgsz: got {got(text)}, expected one side or height,width, multiples of 32, as in 640"
        )
    return sides[0], sides[-1]


def run(chosen: Settings) -> AB:
    """Compare both models, and return the A/B document. If `out` is given, also write the document to that file.

    Raises:
        RecipeError: Classes, sizes or image sets differ, or `a` or `b` is not a model.
        CompressError, EngineError, RuntimeUnavailable: Other errors that a user can fix.
    """
    with tempfile.TemporaryDirectory(prefix="yolo_compress_ab_") as folder:
        scratch = [Path(folder) / key for key in "ab"]
        for path in scratch:
            path.mkdir()
        both = [open_contender(text, path) for text, path in zip((chosen.a, chosen.b), scratch, strict=True)]
        imgsz = one_size(both, chosen.imgsz)
        data = _data(chosen.data)
        found = [_detections(key, side, data, imgsz) for key, side in zip("ab", both, strict=True)]
        latency_a, latency_b = _latency(both, data, imgsz, scratch)
    document = compare(
        [absolute_boxes(sample) for sample in data.val],
        found[0][0],
        found[1][0],
        data.names,
        margin=chosen.margin,
        conf=chosen.conf,
        replicates=chosen.replicates,
        seed=chosen.seed,
        latency_a=latency_a,
        latency_b=latency_b,
        about_a=_about(both[0], found[0][1], imgsz),
        about_b=_about(both[1], found[1][1], imgsz),
        image_set=data.val_digest,
    )
    if chosen.out is not None:
        atomic_write(chosen.out, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def _data(name: str) -> Dataset:
    """Load the data set. If an image cannot be used, leave it out for both models and print its name."""
    cache = home.weights() / ".cache" / "data" if home.weights().is_dir() else None
    data = load(name, on_bad="skip", allow_overlap=True, cache=cache)
    for note in [*data.skipped, *data.notes]:
        progress.notice(f"data: {note}")
    return data


def _detections(key: str, side: Contender, data: Dataset, imgsz: tuple[int, int]) -> tuple[list[np.ndarray], str]:
    with progress.bar(f"ab: {key}", len(data.val) if side.runs else 0, "image") as advance:
        return side.detections(data, imgsz, advance)


def _about(side: Contender, executed: str, imgsz: tuple[int, int]) -> Side:
    if isinstance(side, Cascade):  # of two sizes
        return {"label": side.label, "executed": executed}
    return {"label": side.label, "executed": executed, "imgsz": list(imgsz)}


def _latency(
    both: Sequence[Contender], data: Dataset, imgsz: tuple[int, int], scratch: Sequence[Path]
) -> tuple[Rounds | None, Rounds | None]:
    """Return the latencies of models A and B. They are comparable only if they were measured alternately, here or by one bench.

    Engines are timed alone. A cascade has no engine of its own, so if one of both is a cascade, both are timed from a decoded image to
    its detections. If the latencies are not comparable, print a notice and return None for both.
    """
    first, second = both
    if isinstance(first, Measured) and isinstance(second, Measured) and first.bench.path.samefile(second.bench.path):
        return first.rounds(), second.rounds()
    if isinstance(first, Measured) or isinstance(second, Measured):
        progress.notice(
            "latency is not compared: only one bench that measured both models, or two engines that run here, can be compared"
        )
        return None, None
    specs: list[Spec] = []
    if isinstance(first, Cascade) or isinstance(second, Cascade):
        if isinstance(first, Checkpoint) or isinstance(second, Checkpoint):
            progress.notice(
                "latency is not compared: a cascade is timed with letterbox and NMS, and a checkpoint without"
            )
            return None, None
        images = [str(sample.image) for sample in data.val[:END_TO_END_IMAGES]]
        specs += [
            {"label": side.label, "engine": str(side.folder), "module": end_to_end.MODULE, "images": images}
            for side in (first, second)
        ]
    else:
        inputs = scratch[0] / "inputs.npy"
        write_inputs(inputs, data.val, imgsz)
        specs += [
            {**side.spec(data, imgsz, path), "label": side.label, "inputs": str(inputs)}
            for side, path in zip((first, second), scratch, strict=True)
        ]
    with progress.bar("ab: latency", 2 * ROUNDS, "round") as advance:
        a, b = measure_in_turn(specs, ROUNDS, SAMPLES, progress=advance)
    return a["rounds_ms"], b["rounds_ms"]


def text(document: Mapping[str, Any]) -> str:
    """Return the result of a comparison as text: the verdict, then a table of the measurements."""
    conf, at, latency = document["settings"]["conf"], document["operating"], document["latency"]
    rows: list[tuple[str, ...]] = [("", "A", "B", "B - A", "95 % interval")]
    for name, key in (("mAP50-95", "map50_95"), ("mAP50", "map50")):
        rows.append(_row(name, document[key]))
    rows += [_row(f"{row['name']} ({row['truths']})", row) for row in document["by_class"] if row["truths"]]
    rows += [_row(f"{row['name']} ({row['truths']})", row) for row in document["by_size"] if row["truths"]]
    odds = at["mcnemar"]
    alone = f"A alone {odds['a_only']}, B alone {odds['b_only']}, p {odds['p']:.2g}"
    for name, key, note in (
        (f"recall at {conf:g}", "recall", alone),
        (f"false at {conf:g}, an image", "false_positives_per_image", ""),
    ):
        a, b = at["a"][key], at["b"][key]
        rows.append((name, fixed(a), fixed(b), signed(b - a), note))
    if latency is not None:
        a, b = latency["a_p50_ms"], latency["b_p50_ms"]
        span = f"A/B {times(latency['ratio'])} ({latency['low']:.2f} to {latency['high']:.2f})"
        rows.append(("latency p50, ms", three_digits(a), three_digits(b), signed(b - a), span))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3)), row[4]]) for row in rows
    ]
    threshold = at["threshold_b"]
    restore = "no threshold restores A's recall" if threshold is None else f"conf={threshold:g} gives B the recall of A"
    return "\n".join([document["verdict"]["line"], "", *(line.rstrip() for line in lines), "", f"B: {restore}"])


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    span = "" if figures["low"] is None else f"{signed(figures['low'], 4)} to {signed(figures['high'], 4)}"
    return name, fixed(figures["a"]), fixed(figures["b"]), signed(figures["delta"], 4), span
