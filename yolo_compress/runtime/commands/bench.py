"""`python3 bench.py`: what this robot's engines are worth, measured here: golden self-test, mAP, latency, throughput, memory, power.

Writes `device.json`, which `yolo-compress report add=device.json` puts beside the workstation's rows. Exit code 1 where the golden
self-test fails: such an engine does not do what the workstation's did.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .. import registry
from ..backends.base import load_info, sha256_file
from ..detect.detector import Detector
from ..detect.pre import UnreadableImage, letterbox, read_image
from ..detect.sources import Picture
from ..detect.stream import open_pipeline
from ..engine import BACKENDS, open_engine
from ..errors import NotFinite, SourceError
from ..measure import golden, jetson
from ..measure.groundtruth import Labelled, absolute, coco_file, image_set, yolo_folder
from ..measure.interleaved import measure_in_turn
from ..measure.latency import measure, percentiles
from ..secure.seal import written
from .build import choose_runtimes
from .common import (
    ENGINES,
    HERE,
    Bundle,
    Parser,
    answer,
    built_engines,
    engine_folder,
    guarded,
    opened,
    outside,
    positive,
    say,
    seconds,
)

SCHEMA = 1
OUT = "device.json"
ROUNDS = 4  # even, see interleaved.py
END_TO_END = 200  # calls from a decoded image to its detections
THROUGHPUT_S, IDLE_S = 5.0, 10.0
WARMUP_MS, WARMUP_N = 200.0, 10


class Plan(NamedTuple):
    """What is measured, and for how long.

    Attributes:
        labelled: validation images; None leaves mAP out.
        iterations: timed calls of an engine alone.
        power_s: seconds of load under the power meter.
        threads: of one inference on a CPU; None = every usable processor.
    """

    labelled: Optional[List[Labelled]] = None
    iterations: int = 1000
    power_s: float = 30.0
    threads: Optional[int] = None


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Measure, write device.json, print a table, and return the exit code."""
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("--engine", action="append", help="in engines/, or a path (default: each that is there)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="images/ and labels/ (YOLO), or the images of --coco"
    )
    parser.add_argument("--coco", type=Path, metavar="FILE", help="COCO json of the images in --data")
    parser.add_argument("--golden", action="store_true", help="the golden self-test alone; writes nothing")
    parser.add_argument(
        "--iterations", type=positive, default=Plan().iterations, help="timed calls an engine (default 1000)"
    )
    parser.add_argument(
        "--power-s", type=seconds, default=Plan().power_s, help="seconds under the power meter (default 30)"
    )
    parser.add_argument("--threads", type=positive, help="of one inference on a CPU")
    parser.add_argument("--out", type=Path, help=f"default: {OUT} in the bundle")
    parser.add_argument(
        "--latency-table", type=Path, metavar="FOLDER", help="time the layers of a folder of `probe` instead"
    )
    options = parser.parse_args(argv)
    if options.coco is not None and options.data is None:
        parser.error("--coco needs --data, the folder of its images")
    floats = [f"{runtime}-{precision}" for runtime in BACKENDS for precision in ("fp32", "fp16")]
    if options.latency_table is not None and not set(options.engine or []) <= set(floats):
        parser.error(f"--latency-table times float networks: --engine one of {', '.join(floats)}")

    def action() -> int:
        bundle = opened(directory)
        if options.latency_table is not None:
            return _latency_table(options)
        out = outside(bundle, options.out or directory / OUT, "--out")
        folders = _engines(bundle, options.engine)
        if options.golden:
            return _self_test(bundle, folders)
        labelled = None
        if options.coco is not None:
            labelled = coco_file(options.coco, options.data, bundle.names)
        elif options.data is not None:
            labelled = yolo_folder(options.data, len(bundle.names))
        plan = Plan(labelled, options.iterations, options.power_s, options.threads)
        _require_writable(out)
        document = bench(bundle, folders, plan)
        written(out, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("utf-8"))
        answer(table(document))
        answer(json.dumps({"device": str(out), "golden": document["golden"]}))
        return 0 if document["golden"]["passed"] else 1

    return guarded(action)


def _self_test(bundle: Bundle, folders: Sequence[Path]) -> int:
    """The golden images through each engine; a line each, the last line JSON."""
    tested = {}
    for folder in folders:
        info = load_info(folder)
        with open_engine(folder) as engine:
            tested[folder.name] = test = golden.check(bundle.directory, engine, info.runtime, info.library)
        say(f"{folder.name}: golden images {'passed' if test['passed'] else 'FAILED: ' + test['reason']}")
    answer(json.dumps({"golden": tested}))
    return 0 if all(test["passed"] for test in tested.values()) else 1


def bench(bundle: Bundle, folders: Sequence[Path], plan: Plan) -> Dict[str, Any]:
    """Everything of every engine: the document of device.json.

    Raises:
        EngineError, RuntimeUnavailable, LatencyError, NotFinite, SourceError: see the parts.
    """
    images = golden.load(bundle.directory)[1]
    meter = jetson.Meter()
    idle_w = meter.idle(IDLE_S)
    rows, digest, tested = [], None, []
    for folder in folders:
        info = load_info(folder)
        say(f"{folder.name}: golden images{', mAP' if plan.labelled is not None else ''}, end to end")
        with open_engine(folder, threads=None if registry.RUNTIMES[info.runtime].gpu else plan.threads) as engine:
            test = golden.check(bundle.directory, engine, info.runtime, info.library)
            row: Dict[str, Any] = {"model": "compressed", "runtime": info.runtime, "precision": info.precision,
                                   "executed": engine.executed, "library": info.library, "golden": test}  # fmt: skip
            accuracy: Dict[str, Any] = {"map50_95": None, "map50": None, "images": None}
            if plan.labelled is not None:
                accuracy, digest = mean_ap(engine, plan.labelled, bundle), digest or _digest(bundle, plan.labelled)
            row.update(accuracy, image_set=digest, **_end_to_end(engine, images))
        tested.append(test)
        rows.append(dict(row, fps=throughput(folder, images), status="ok", reason=None))
    _latency(bundle, folders, plan, images, rows)
    for folder, row in zip(folders, rows):
        row.update(_power(folder, plan, meter, images), idle_w=idle_w)
    libraries = {row["runtime"]: row["library"] for row in rows}
    return {
        "schema": SCHEMA,
        "bundle": bundle.about(),
        "device": jetson.state(),
        "runtime": rows[0]["runtime"],
        "library": rows[0]["library"],
        "libraries": libraries,
        "names": list(bundle.names),
        "imgsz": list(bundle.imgsz),
        "power_from": meter.source,
        "rows": rows + [_missing(bundle, name, rows) for name in sorted(set(BACKENDS) - set(libraries))],
        "golden": {
            "passed": all(test["passed"] for test in tested),
            "worst_box_px": max(test["worst_box_px"] for test in tested),
            "worst_score": max(test["worst_score"] for test in tested),
        },
    }


def mean_ap(engine: Any, labelled: Sequence[Labelled], bundle: Bundle) -> Dict[str, Any]:
    """mAP of an engine as the workstation takes it: score 0.001, NMS at 0.7, COCO's AP.

    Raises:
        SourceError: an image that cannot be read, or no box at all.
        NotFinite: names the image.
    """
    from ..limits import counted
    from ..measure.coco_map import mean_ap as matched

    detector, truths, found = Detector(engine, max_det=bundle.max_det), [], []
    for one in labelled:
        try:
            image_HW3 = read_image(one.image)
            found.append(detector(image_HW3))
        except UnreadableImage as error:
            raise SourceError(str(error)) from error
        except NotFinite as error:
            raise NotFinite(f"{one.image}: {error}") from error
        truths.append(absolute(one.boxes, image_HW3.shape[0], image_HW3.shape[1]))
    try:
        result = matched(truths, found, bundle.names, counted(bundle.max_det))
    except ValueError as error:
        raise SourceError(str(error)) from error
    return {
        "map50_95": result["map50_95"],
        "map50": result["map50"],
        "per_class": result["per_class"],
        "images": len(found),
    }


def _digest(bundle: Bundle, labelled: Sequence[Labelled]) -> str:
    """The workstation's digest of its validation set where these are its images and boxes, else their own."""
    content = image_set([(sha256_file(one.image), one.boxes) for one in labelled], bundle.names)
    known = bundle.manifest.get("val", {})
    return str(known.get("digest", content)) if content == known.get("content") else content


def _end_to_end(engine: Any, images: Sequence[np.ndarray]) -> Dict[str, Any]:
    """From a decoded image to its detections, one after another."""
    detector = Detector(engine, 0.25, multi_label=False)
    calls = [lambda image=image: detector(image) for image in images]
    samples = measure(calls[0], END_TO_END, WARMUP_MS, WARMUP_N, calls)
    return {f"end_to_end_{key[8:]}": value for key, value in percentiles(samples.tolist()).items()}


def throughput(
    folder: Path, images: Sequence[np.ndarray], duration_s: float = THROUGHPUT_S, meter: Optional[jetson.Meter] = None
) -> float:
    """Decoded images a second through the pipeline, as detect.py runs it; the meter sees the timed part alone."""
    stop = [float("inf")]

    def pictures() -> Any:
        number = 0
        while time.perf_counter() < stop[0]:
            yield Picture(str(number), partial(np.asarray, images[number % len(images)]))
            number += 1

    with open_pipeline(folder) as pipeline:
        warm = iter(pipeline(pictures()))
        for _ in range(2 * WARMUP_N):
            next(warm)
        warm.close()
        with nullcontext() if meter is None else meter:
            start = time.perf_counter()
            stop[0] = start + duration_s
            done = sum(1 for _ in pipeline(pictures()))
            return done / (time.perf_counter() - start)


def _latency(
    bundle: Bundle, folders: Sequence[Path], plan: Plan, images: Sequence[np.ndarray], rows: Sequence[Dict[str, Any]]
) -> None:
    """Engines alone, each in a process of its own, in turn; and the memory of those processes."""
    say(f"latency: {plan.iterations} calls an engine, in {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        file = os.path.join(scratch, "inputs.npy")
        np.save(file, np.stack([letterbox(image, bundle.imgsz)[0] for image in images]))
        specs = [
            {
                "label": folder.name,
                "engine": str(folder),
                "inputs": file,
                "threads": None if registry.RUNTIMES[row["runtime"]].gpu else plan.threads,
            }
            for folder, row in zip(folders, rows)
        ]
        results = measure_in_turn(specs, ROUNDS, -(-plan.iterations // ROUNDS))
    for row, result in zip(rows, results):
        row.update(percentiles(result["samples_ms"][: plan.iterations]), memory_mib=result["memory_mib"])
        row.update(threads=result["threads"], latency_quiet=result["quiet"])


def _power(folder: Path, plan: Plan, meter: jetson.Meter, images: Sequence[np.ndarray]) -> Dict[str, Any]:
    """Watts under the pipeline's full load, and what a frame of it takes; None where nothing can be measured."""
    if meter.source is None:
        return {"power_w": None, "energy_mj_per_frame": None}
    say(f"{folder.name}: power, {plan.power_s:g} s")
    fps = throughput(folder, images, plan.power_s, meter)
    watts = meter.mean()
    return {"power_w": watts, "energy_mj_per_frame": None if watts is None else watts / fps * 1e3}


def _missing(bundle: Bundle, runtime: str, rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """A row for the report: this runtime was not measured here, and why."""
    empty = {key: None for key in rows[0]}
    reason = BACKENDS[runtime].probe() or "no engine of it was built here (build.py --runtime)"
    return dict(
        empty, model="compressed", runtime=runtime, precision=bundle.precisions[-1], status="missing", reason=reason
    )


def _engines(bundle: Bundle, asked: Optional[Sequence[str]]) -> List[Path]:
    """Folders of the engines to be measured, each whole and of this bundle."""
    if asked:
        return [engine_folder(bundle, name) for name in dict.fromkeys(asked)]
    names = built_engines(bundle.directory / ENGINES)
    return [engine_folder(bundle, name) for name in names] or [engine_folder(bundle)]


def _latency_table(options: Any) -> int:
    """The table that `prune.latency_ms` plans with, as one JSON document; of one runtime and a float precision."""
    from ..measure.layer_times import take

    runtime, _, precision = (options.engine or [f"{choose_runtimes(None)[0]}-fp32"])[0].partition("-")
    answer(json.dumps(take(options.latency_table, runtime, precision, options.threads)))
    return 0


def _require_writable(out: Path) -> None:
    """Raises OSError before a minute of measuring, rather than after it."""
    try:
        if not out.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = out.with_name(out.name + ".partial")
        open(str(probe), "wb").close()
        os.unlink(str(probe))
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; give --out FILE in a folder that can be written", str(out)
        ) from error


def table(document: Dict[str, Any]) -> str:
    """The rows for people."""
    heads = ("engine", "mAP50-95", "p50 ms", "p99 ms", "all p50 ms", "fps", "MiB", "W", "mJ", "golden")
    keys = (
        "map50_95",
        "latency_p50_ms",
        "latency_p99_ms",
        "end_to_end_p50_ms",
        "fps",
        "memory_mib",
        "power_w",
        "energy_mj_per_frame",
    )
    lines: List[Tuple[str, ...]] = [heads]
    for row in document["rows"]:
        if row["status"] == "ok":
            figures = tuple("-" if row[key] is None else f"{row[key]:.4g}" for key in keys)
            verdict = "passed" if row["golden"]["passed"] else f"FAILED: {row['golden']['reason']}"
            lines.append((f"{row['runtime']}-{row['precision']}",) + figures + (verdict,))
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(heads) - 1)] + [0]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in lines)
