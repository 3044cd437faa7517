"""`yolo-compress predict`: detect objects in images with an engine. Print a JSON line per image, and a summary."""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_compress import progress
from yolo_compress.cli.grammar import Command
from yolo_compress.data.data_yaml import left_out
from yolo_compress.errors import DataError, RecipeError, Terminated
from yolo_compress.exits import SIGINT, SIGTERM
from yolo_compress.files.atomic import storage_errors
from yolo_compress.recipe.messages import got
from yolo_compress.runtime.detect.draw import line, write_drawing
from yolo_compress.runtime.detect.sources import IMAGE_SUFFIXES, open_source
from yolo_compress.runtime.detect.stream import ImageDetections, open_pipeline
from yolo_compress.runtime.engine import names_of
from yolo_compress.runtime.measure.latency import percentiles

LINES, PICTURES = "detections.jsonl", "pictures"  # in the folder `out`


@dataclass(frozen=True)
class Settings:
    """Options of one call of `predict`.

    If `out` is None, results go to stdout. If `engines` is None, `open_pipeline` chooses the number of engines.
    """

    source: str
    engine: Path
    out: Path | None = None
    draw: bool = False
    conf: float = 0.25
    iou: float = 0.7
    engines: int | None = None


def handle(command: Command) -> int:
    """Detect objects in every image, and print the summary as the last line."""
    summary = run(settings(command.options))
    progress.result(json.dumps(summary))
    if ended := summary["ended_by"]:
        done = summary["pictures"] + summary["unreadable"]
        written = f"; their lines are in {summary['out']}" if summary["out"] else ""
        progress.notice(f"{ended} after {done} images{written}; the remaining images were not processed")
        return SIGINT if ended == "interrupted" else SIGTERM
    complain(summary)
    return 0


def settings(options: Mapping[str, str]) -> Settings:
    """Read the options of the command line.

    Raises:
        RecipeError: A value is out of range, or `draw` is set but `out`, the folder for the images, is not.
    """
    out, draw = options.get("out"), options.get("draw") == "true"
    if draw and out is None:
        raise RecipeError("command line: draw=true needs a folder to write to: out=FOLDER")
    return Settings(
        options["source"],
        Path(options["engine"]),
        None if out is None else Path(out),
        draw,
        _share(options, "conf", Settings.conf),
        _share(options, "iou", Settings.iou),
        _count(options),
    )


def _share(options: Mapping[str, str], key: str, default: float) -> float:
    text = options.get(key, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"command line: {key}: got {got(text)}, expected a number from 0 to 1")
    return value


def _count(options: Mapping[str, str]) -> int | None:
    text = options.get("engines")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= 64):
        raise RecipeError(f"command line: engines: got {got(text)}, expected a whole number from 1 to 64")
    return int(text)


def run(chosen: Settings) -> dict[str, Any]:
    """Detect objects in every image and return a summary. Ctrl-C, SIGTERM or a closed stdout end the run early, with a summary.

    Returns:
        A summary with the keys `source`, `engine`, `pictures` (number of images processed), `unreadable`, `first_unreadable`,
        `detections` (number of boxes), `seconds`, `fps`, `ended_by` ("interrupted", "terminated" or None) and `out`. The
        latencies have the keys of `latency.percentiles`, such as `latency_p50_ms`.

    Raises:
        SourceError: The source does not exist, holds no image, or fails.
        EngineError, RuntimeUnavailable: The engine cannot be opened.
        NotFinite: The model's output holds NaN or infinity.
        RecipeError: The folder `out` has results of an earlier call.
        StorageError: The disk is full or cannot be written.
    """
    source = open_source(chosen.source)
    if Path(chosen.source).is_dir():
        names_there = (entry.name for entry in os.scandir(chosen.source) if entry.is_file())
        if note := left_out(name for name in names_there if Path(name).suffix[1:].lower() not in IMAGE_SUFFIXES):
            progress.notice(f"{chosen.source}: {note}")
    names = names_of(chosen.engine)
    pictures = unreadable = boxes = 0
    first_unreadable, ended_by, latencies_ms = None, None, array("d")
    with (
        open_pipeline(chosen.engine, chosen.engines, chosen.conf, chosen.iou) as pipeline,
        _writer(chosen, names) as write,
        progress.bar("predict", source.total or 0, "images") as advance,
        closing(pipeline(source.images)) as stream,
    ):
        start = time.perf_counter()
        try:
            for found in stream:
                if not write(found):
                    break
                if found.problem is None:
                    pictures, boxes = pictures + 1, boxes + len(found.detections_N6)
                    latencies_ms.append(found.ms)
                else:
                    progress.notice(f"unreadable: {found.problem}")
                    unreadable, first_unreadable = unreadable + 1, first_unreadable or found.problem
                advance()
        except KeyboardInterrupt:
            ended_by = "interrupted"
        except Terminated:
            ended_by = "terminated"
        seconds = time.perf_counter() - start
    return {
        "source": chosen.source,
        "engine": str(chosen.engine),
        "pictures": pictures,
        "unreadable": unreadable,
        "first_unreadable": first_unreadable,
        "detections": boxes,
        "seconds": round(seconds, 3),
        "fps": round(pictures / seconds, 2),
        **{
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in percentiles(latencies_ms).items()
        },
        "ended_by": ended_by,
        "out": None if chosen.out is None else str(chosen.out),
    }


def complain(summary: Mapping[str, Any]) -> None:
    """Raise DataError if the summary counts unreadable images. The results of all readable images are already written."""
    if summary["unreadable"]:
        read = summary["pictures"]
        raise DataError(
            f"{summary['unreadable']} of {summary['unreadable'] + read} images could not be read, the first: "
            f"{summary['first_unreadable']}"
        )


@contextmanager
def _writer(chosen: Settings, names: tuple[str, ...]) -> Iterator[Callable[[ImageDetections], bool]]:
    """Yield a function that writes the result of an image as a line. With the option `draw`, it writes the image too.

    The function returns False once the reader has closed stdout.
    """
    if chosen.out is None:
        yield lambda found: progress.result(line(found, names))
        return
    out, pictures = chosen.out, chosen.out / PICTURES
    if (out / LINES).exists():
        raise RecipeError(f"{out / LINES}: exists, from an earlier call; give another folder as out")
    with storage_errors(out):
        (pictures if chosen.draw else out).mkdir(parents=True, exist_ok=True)
        stream = open(out / LINES, "x", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(found: ImageDetections) -> bool:
        with storage_errors(out):
            stream.write(line(found, names) + "\n")
            if chosen.draw and found.image_HW3 is not None:
                file = pictures / f"{Path(found.name).name.replace('#', '-')}.jpg"
                write_drawing(file, found.image_HW3, found.detections_N6, names)
        return True

    try:
        yield write
    finally:
        with storage_errors(out):
            stream.close()
