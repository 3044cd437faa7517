"""`python3 bench.py`: measure the engines on this robot: golden self-test, mAP, latency, throughput, memory and power.

The command writes `device.json`. On the machine that made the bundle, `yolo-compress report add=device.json` adds its rows to the
report. Exit code 1: the golden self-test failed, so an engine's detections differ from the expected detections in the bundle.
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
from typing import Any, Dict, List, Literal, NamedTuple, Optional, Protocol, Sequence, Tuple, TypedDict, Union, cast

import numpy as np

from .. import registry
from ..backends.base import Backend, load_info
from ..detect.detector import Detector
from ..detect.pre import UnreadableImage, letterbox, read_image
from ..detect.sources import SourceImage
from ..detect.stream import open_pipeline
from ..engine import BACKENDS, open_engine
from ..errors import NotFinite, SourceError
from ..files import sha256_file
from ..measure import golden, jetson
from ..measure.groundtruth import Labelled, absolute, coco_file, image_set, yolo_folder
from ..measure.interleaved import measure_in_turn
from ..measure.latency import measure, percentiles
from ..measure.messages import Measured, Percentiles, Spec
from ..secure.signed_manifest import written
from .build import choose_runtimes
from .bundle import ENGINES, HERE, MEASURED, Bundle, BundleId, built_engines, engine_folder, open_bundle, outside
from .command_line import Parser, answer, positive, run_command, say, seconds

SCHEMA = 1
ROUNDS = 4  # an even number cancels linear drift, see interleaved.py
END_TO_END = 200  # calls from a decoded image to its detections
THROUGHPUT_S, IDLE_S = 5.0, 10.0
WARMUP_MS, WARMUP_N = 200.0, 10


class Subject(TypedDict):
    """The engine of a row, and the result of its golden self-test."""

    model: str  # "compressed"
    runtime: str
    precision: str  # the requested precision
    executed: str  # the arithmetic that the library chose, as text
    library: str  # version of the runtime
    golden: golden.SelfTest


class _Ap(TypedDict):
    map50_95: Optional[float]  # a fraction; null without --data, as `map50` and `images`
    map50: Optional[float]
    images: Optional[int]


class Accuracy(_Ap, total=False):
    """Accuracy on the images of --data."""

    per_class: Dict[str, Optional[float]]  # map50_95 by class name; absent without --data


class EndToEnd(TypedDict):
    """Latency from a decoded image to its detections, one image at a time. A percentile is null if too few calls were timed."""

    end_to_end_p50_ms: Optional[float]
    end_to_end_p90_ms: Optional[float]
    end_to_end_p95_ms: Optional[float]
    end_to_end_p99_ms: Optional[float]
    end_to_end_n: int  # timed calls


class Alone(Percentiles):
    """Latency of the engine without pre- and postprocessing, measured in a separate process."""

    memory_mib: Optional[float]  # peak memory of that process
    threads: Optional[int]  # threads of one inference on a CPU
    latency_quiet: bool  # whether other programs were idle in all rounds, and the engine between them


class Power(TypedDict):
    """Power draw. Null: this machine has no power meter."""

    power_w: Optional[float]  # under the pipeline's full load
    energy_mj_per_frame: Optional[float]  # mJ per image under that load


class _Rest(TypedDict):
    status: Literal["ok"]
    reason: Optional[str]
    image_set: Optional[str]  # digest of the images of --data and their boxes
    fps: float  # decoded images per second, several in parallel
    idle_w: Optional[float]


class MeasuredRow(Subject, Accuracy, EndToEnd, Alone, Power, _Rest):
    """A row of device.json for an engine that was measured."""


class MissingRow(TypedDict):
    """A row of device.json for a runtime without an engine. All other keys of `MeasuredRow` are null."""

    model: str  # "compressed"
    runtime: str
    precision: str
    status: Literal["missing"]
    reason: str


class Worst(TypedDict):
    """The worst result of the golden self-tests of all engines."""

    passed: bool
    worst_box_px: float
    worst_score: float


class Document(TypedDict):
    """The document in device.json."""

    schema: int
    bundle: BundleId
    device: jetson.JetsonState
    runtime: str  # runtime of the first row
    library: str  # version of that runtime
    libraries: Dict[str, str]  # runtime -> version
    names: List[str]  # class names in the order of their index
    imgsz: List[int]  # [height, width] of the input, px
    power_from: Optional[str]  # the meter of `power_w`
    rows: List[Union[MeasuredRow, MissingRow]]
    golden: Worst


class _Opened(NamedTuple):
    """Results of one engine that are measured in this process: self-test, accuracy, end-to-end latency and throughput."""

    subject: Subject
    accuracy: Accuracy
    end_to_end: EndToEnd
    fps: float


class Plan(NamedTuple):
    """Settings of `bench.py`: images, number of calls, duration and threads.

    Attributes:
        labelled: validation images with labels. None: do not measure mAP.
        iterations: timed calls per engine.
        power_s: duration of the power measurement, seconds.
        threads: threads of one inference on a CPU. None: one per usable processor.
    """

    labelled: Optional[List[Labelled]] = None
    iterations: int = 1000
    power_s: float = 30.0
    threads: Optional[int] = None


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Measure, write device.json, print a table, and return the exit code."""
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("--engine", action="append", help="name in engines/, or path (default: all in engines/)")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="images/ and labels/ (YOLO), or the images of --coco"
    )
    parser.add_argument("--coco", type=Path, metavar="FILE", help="COCO json of the images in --data")
    parser.add_argument("--golden", action="store_true", help="run only the golden self-test; write nothing")
    parser.add_argument(
        "--iterations", type=positive, default=Plan().iterations, help="timed calls per engine (default 1000)"
    )
    parser.add_argument(
        "--power-s", type=seconds, default=Plan().power_s, help="seconds of the power measurement (default 30)"
    )
    parser.add_argument("--threads", type=positive, help="threads of one inference on a CPU")
    parser.add_argument("--out", type=Path, help=f"default: {MEASURED} in the bundle")
    parser.add_argument(
        "--latency-table", type=Path, metavar="FOLDER", help="only time the layers of the models that `probe` wrote"
    )
    options = parser.parse_args(argv)
    if options.coco is not None and options.data is None:
        parser.error("--coco needs --data, the folder of its images")
    floats = [
        f"{runtime}-{precision}" for runtime in registry.names(times_layers=True) for precision in ("fp32", "fp16")
    ]
    if options.latency_table is not None and not set(options.engine or []) <= set(floats):
        parser.error(f"--latency-table times models in float: give one of {', '.join(floats)} as --engine")

    def action() -> int:
        bundle = open_bundle(directory)
        if options.latency_table is not None:
            return _latency_table(options)
        out = outside(bundle, options.out or directory / MEASURED, "--out")
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

    return run_command(action)


def _self_test(bundle: Bundle, folders: Sequence[Path]) -> int:
    """Run the golden self-test of each engine and return the exit code. stderr gets a line per engine. stdout gets a JSON line."""
    tested = {}
    for folder in folders:
        info = load_info(folder)
        with open_engine(folder) as engine:
            tested[folder.name] = test = golden.check(bundle.directory, engine, info)
        say(f"{folder.name}: golden images {'passed' if test['reason'] is None else 'FAILED: ' + test['reason']}")
    answer(json.dumps({"golden": tested}))
    return 0 if all(test["passed"] for test in tested.values()) else 1


def bench(bundle: Bundle, folders: Sequence[Path], plan: Plan) -> Document:
    """Measure every engine and return the document of device.json.

    Raises:
        EngineError, RuntimeUnavailable, LatencyError, NotFinite, SourceError: a measurement failed.
    """
    images = golden.load(bundle.directory)[1]
    meter = jetson.Meter()
    idle_w = meter.idle(IDLE_S)
    engines: List[_Opened] = []
    for folder in folders:
        info = load_info(folder)
        say(f"{folder.name}: golden images{', mAP' if plan.labelled is not None else ''}, end to end")
        with open_engine(
            folder, threads=plan.threads if registry.RUNTIMES[info.runtime].takes_threads else None
        ) as engine:
            test = golden.check(bundle.directory, engine, info)
            subject: Subject = {
                "model": "compressed",
                "runtime": info.runtime,
                "precision": info.precision,
                "executed": engine.executed,
                "library": info.library,
                "golden": test,
            }
            accuracy: Accuracy = {"map50_95": None, "map50": None, "images": None}
            if plan.labelled is not None:
                accuracy = mean_ap(engine, plan.labelled, bundle)
            end_to_end = _end_to_end(engine, images)
        engines.append(_Opened(subject, accuracy, end_to_end, throughput(folder, images)))
    digest = None if plan.labelled is None else _digest(bundle, plan.labelled)
    rows: List[MeasuredRow] = []
    for folder, one, alone in zip(folders, engines, _latency(bundle, folders, plan, images, engines)):
        rest: _Rest = {"status": "ok", "reason": None, "image_set": digest, "fps": one.fps, "idle_w": idle_w}
        power = _power(folder, plan, meter, images)
        rows.append({**one.subject, **one.accuracy, **one.end_to_end, **alone, **power, **rest})
    tested = [one.subject["golden"] for one in engines]
    libraries = {row["runtime"]: row["library"] for row in rows}
    missing = [_missing(bundle, name, rows) for name in sorted(set(BACKENDS) - set(libraries))]
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
        "rows": [*rows, *missing],
        "golden": {
            "passed": all(test["passed"] for test in tested),
            "worst_box_px": max(test["worst_box_px"] for test in tested),
            "worst_score": max(test["worst_score"] for test in tested),
        },
    }


class Judged(Protocol):
    """What `mean_ap` reads of a bundle."""

    @property
    def names(self) -> Tuple[str, ...]:
        """Class names in the order of their index."""

    @property
    def max_det(self) -> int:
        """Largest number of detections per image after NMS."""


def mean_ap(engine: Backend, labelled: Sequence[Labelled], bundle: Judged) -> Accuracy:
    """Measure the mAP of an engine on this robot: score above 0.001, NMS at IoU 0.7, COCO AP.

    The stage `bench` of a recipe measures the mAP in the same way.

    Raises:
        SourceError: an image cannot be read, or no image has a labelled box.
        NotFinite: the output for an image holds NaN or infinity.
    """
    from ..max_detections import counted
    from ..measure.coco_map import mean_ap as coco_mean_ap

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
        result = coco_mean_ap(truths, found, bundle.names, counted(bundle.max_det))
    except ValueError as error:
        raise SourceError(str(error)) from error
    return {
        "map50_95": result["map50_95"],
        "map50": result["map50"],
        "per_class": result["per_class"],
        "images": len(found),
    }


def _digest(bundle: Bundle, labelled: Sequence[Labelled]) -> str:
    """Return the digest of the labelled images. If they are the validation images of the bundle, this is the digest in the bundle."""
    content = image_set([(sha256_file(one.image), one.boxes) for one in labelled], bundle.names)
    known = bundle.manifest.get("val", {})
    return str(known.get("digest", content)) if content == known.get("content") else content


def _end_to_end(engine: Backend, images: Sequence[np.ndarray]) -> EndToEnd:
    """Measure the latency from a decoded image to its detections, one image at a time."""
    detector = Detector(engine, 0.25, multi_label=False)
    calls = [lambda image=image: detector(image) for image in images]
    samples = measure(calls[0], END_TO_END, WARMUP_MS, WARMUP_N, calls)
    latency = percentiles(samples.tolist())
    return {
        "end_to_end_p50_ms": latency["latency_p50_ms"],
        "end_to_end_p90_ms": latency["latency_p90_ms"],
        "end_to_end_p95_ms": latency["latency_p95_ms"],
        "end_to_end_p99_ms": latency["latency_p99_ms"],
        "end_to_end_n": latency["latency_n"],
    }


def throughput(
    folder: Path, images: Sequence[np.ndarray], duration_s: float = THROUGHPUT_S, meter: Optional[jetson.Meter] = None
) -> float:
    """Return the throughput of the pipeline of detect.py, in decoded images per second.

    Args:
        meter: measures power during the timed part, not during the warm-up.
    """
    stop = [float("inf")]

    def pictures() -> Any:
        number = 0
        while time.perf_counter() < stop[0]:
            yield SourceImage(str(number), partial(np.asarray, images[number % len(images)]))
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
    bundle: Bundle, folders: Sequence[Path], plan: Plan, images: Sequence[np.ndarray], engines: Sequence[_Opened]
) -> List[Alone]:
    """Measure the latency and memory of each engine without pre- and postprocessing. Engines have a process each, and take turns."""
    say(f"latency: {plan.iterations} calls per engine, in {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as scratch:
        file = os.path.join(scratch, "inputs.npy")
        np.save(file, np.stack([letterbox(image, bundle.imgsz)[0] for image in images]))
        specs: List[Spec] = [
            {
                "label": folder.name,
                "engine": str(folder),
                "inputs": file,
                "threads": plan.threads if registry.RUNTIMES[one.subject["runtime"]].takes_threads else None,
            }
            for folder, one in zip(folders, engines)
        ]
        results = measure_in_turn(specs, ROUNDS, -(-plan.iterations // ROUNDS))
    return [_alone(result, plan.iterations) for result in results]


def _alone(result: Measured, iterations: int) -> Alone:
    return {
        **percentiles(result["samples_ms"][:iterations]),
        "memory_mib": result["memory_mib"],
        "threads": result["threads"],
        "latency_quiet": result["quiet"],
    }


def _power(folder: Path, plan: Plan, meter: jetson.Meter, images: Sequence[np.ndarray]) -> Power:
    """Measure the power under the pipeline's full load and the energy per image. The values are None if there is no power meter."""
    if meter.source is None:
        return {"power_w": None, "energy_mj_per_frame": None}
    say(f"{folder.name}: power, {plan.power_s:g} s")
    fps = throughput(folder, images, plan.power_s, meter)
    watts = meter.mean()
    return {"power_w": watts, "energy_mj_per_frame": None if watts is None else watts / fps * 1e3}


def _missing(bundle: Bundle, runtime: str, rows: Sequence[MeasuredRow]) -> MissingRow:
    """Return a row for a runtime that was not measured here, with the reason."""
    empty: Dict[str, object] = {key: None for key in rows[0]}
    reason = BACKENDS[runtime].probe() or "no engine was built for it here (build.py --runtime)"
    own: MissingRow = {
        "model": "compressed",
        "runtime": runtime,
        "precision": bundle.precisions[-1],
        "status": "missing",
        "reason": reason,
    }
    return cast(MissingRow, dict(empty, **own))


def _engines(bundle: Bundle, asked: Optional[Sequence[str]]) -> List[Path]:
    """Return the folders of the engines to measure, after checking that each engine is intact and belongs to this bundle."""
    if asked:
        return [engine_folder(bundle, name) for name in dict.fromkeys(asked)]
    names = built_engines(bundle.directory / ENGINES)
    return [engine_folder(bundle, name) for name in names] or [engine_folder(bundle)]


def _latency_table(options: Any) -> int:
    """Print the latency table for `prune.latency_ms` as one JSON document, for one runtime and a float precision."""
    from ..measure.layer_times import take

    able = registry.names(times_layers=True)
    default = next((runtime for runtime in choose_runtimes(None) if runtime in able), able[0])
    runtime, _, precision = (options.engine or [f"{default}-fp32"])[0].partition("-")
    answer(json.dumps(take(options.latency_table, runtime, precision, options.threads)))
    return 0


def _require_writable(out: Path) -> None:
    """Check that the result can be written, before measuring for minutes.

    Raises:
        OSError: `out` cannot be written.
    """
    try:
        if not out.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        probe = out.with_name(out.name + ".partial")
        open(str(probe), "wb").close()
        os.unlink(str(probe))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; set --out to a file in a writable folder", str(out)) from error


def table(document: Document) -> str:
    """Format the measured rows as a text table."""
    heads = ("engine", "mAP50-95", "p50 ms", "p99 ms", "all p50 ms", "fps", "MiB", "W", "mJ", "golden")
    lines: List[Tuple[str, ...]] = [heads]
    for row in document["rows"]:
        if row["status"] == "ok":
            figures = tuple(
                "-" if value is None else f"{value:.4g}"
                for value in (
                    row["map50_95"],
                    row["latency_p50_ms"],
                    row["latency_p99_ms"],
                    row["end_to_end_p50_ms"],
                    row["fps"],
                    row["memory_mib"],
                    row["power_w"],
                    row["energy_mj_per_frame"],
                )
            )
            verdict = "passed" if row["golden"]["passed"] else f"FAILED: {row['golden']['reason']}"
            lines.append((f"{row['runtime']}-{row['precision']}",) + figures + (verdict,))
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(heads) - 1)] + [0]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in lines)
