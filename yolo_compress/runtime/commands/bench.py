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
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, cast

import numpy as np

from .. import registry
from ..backends.base import Backend, EngineInfo, is_policy, load_info
from ..detect.cascade import engines as engines_of
from ..detect.cascade import joined
from ..detect.detector import Detector
from ..detect.pre import UnreadableImage, letterbox, read_image
from ..detect.sources import SourceImage
from ..detect.stream import open_pipeline
from ..engine import BACKENDS, open_engine
from ..errors import EngineError, NotFinite, SourceError
from ..files import sha256_file
from ..measure import golden, jetson
from ..measure.cascade_latency import cascade_latency
from ..measure.groundtruth import Labelled, absolute, coco_file, image_set, yolo_folder
from ..measure.interleaved import measure_in_turn
from ..measure.latency import measure, percentiles
from ..measure.messages import Measured, Spec
from ..secure.signed_manifest import written
from .build import choose_runtimes
from .bundle import (
    ENGINES,
    HERE,
    MEASURED,
    Bundle,
    built_engines,
    engine_folder,
    open_bundle,
    outside,
)
from .command_line import Parser, answer, positive, run_command, say, seconds
from .device_json import (
    SCHEMA,
    Accuracy,
    Alone,
    CascadeRow,
    Document,
    EndToEnd,
    MeasuredRow,
    MissingRow,
    Power,
    Rest,
    Subject,
    cascade_table,
    table,
)

ROUNDS = 4  # an even number cancels linear drift, see interleaved.py
END_TO_END = 200  # calls from a decoded image to its detections
THROUGHPUT_S, IDLE_S = 5.0, 10.0
MIXED = 100  # images that the throughput of a cascade is measured on
WARMUP_MS, WARMUP_N = 200.0, 10


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
    parser.add_argument(
        "--engine", action="append", help="name in engines/, or path of an engine or cascade (default: all in engines/)"
    )
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
        if "cascades" in document:
            answer(cascade_table(document["cascades"]))
        answer(json.dumps({"device": str(out), "golden": document["golden"]}))
        return 0 if document["golden"]["passed"] else 1

    return run_command(action)


def _self_test(bundle: Bundle, folders: Sequence[Path]) -> int:
    """Run the golden self-test of each engine and return the exit code. stderr gets a line per engine. stdout gets a JSON line."""
    tested = {}
    for folder in folders:
        with open_engine(folder) as engine:
            tested[folder.name] = test = _golden(bundle, folder, engine)
        say(f"{folder.name}: golden images {'passed' if test['reason'] is None else 'FAILED: ' + test['reason']}")
    answer(json.dumps({"golden": tested}))
    return 0 if all(test["passed"] for test in tested.values()) else 1


def _golden(bundle: Bundle, folder: Path, engine: Backend) -> golden.SelfTest:
    """Run the golden self-test of an opened engine or cascade.

    Raises:
        EngineError: it is a cascade, but not that of this bundle.
    """
    if not is_policy(folder):
        return golden.check(bundle.directory, engine, load_info(folder))
    if bundle.cascade is None or not bundle.cascade.made(folder):
        raise EngineError(
            f"{folder}: not the cascade of this bundle, so the bundle cannot test it; give an engine of it"
        )
    (_, small), (_, large) = engines_of(folder)[1]
    return golden.check(bundle.cascade.directory, engine, joined(small, large))


def bench(bundle: Bundle, measured: Sequence[Path], plan: Plan) -> Document:
    """Measure every engine and every cascade, and return the document of device.json.

    Raises:
        EngineError, RuntimeUnavailable, LatencyError, NotFinite, SourceError: a measurement failed.
    """
    images = golden.load(bundle.directory)[1]
    folders = [folder for folder in measured if not is_policy(folder)]
    meter = jetson.Meter()
    idle_w = meter.idle(IDLE_S)
    engines: List[_Opened] = []
    for folder in folders:
        info = load_info(folder)
        say(f"{folder.name}: golden images{', mAP' if plan.labelled is not None else ''}, end to end")
        with open_engine(
            folder, threads=plan.threads if registry.RUNTIMES[info.runtime].takes_threads else None
        ) as engine:
            subject, accuracy = _judged(bundle, folder, engine, info, plan)
            end_to_end = _end_to_end(engine, images)
        engines.append(_Opened(subject, accuracy, end_to_end, throughput(folder, images)))
    digest = None if plan.labelled is None else _digest(bundle, plan.labelled)
    rows: List[MeasuredRow] = []
    for folder, one, alone in zip(folders, engines, _latency(bundle, folders, plan, images, engines)):
        rest: Rest = {"status": "ok", "reason": None, "image_set": digest, "fps": one.fps, "idle_w": idle_w}
        power = _power(folder, plan, meter, images)
        rows.append({**one.subject, **one.accuracy, **one.end_to_end, **alone, **power, **rest})
    cascades = [_cascade(bundle, folder, plan, digest) for folder in measured if is_policy(folder)]
    subjects: List[Subject] = [*(one.subject for one in engines), *cascades]
    tested = [one["golden"] for one in subjects]
    libraries = {one["runtime"]: one["library"] for one in subjects}
    missing = [_missing(bundle, name, plan.labelled is not None) for name in sorted(set(BACKENDS) - set(libraries))]
    document: Document = {
        "schema": SCHEMA,
        "bundle": bundle.about(),
        "device": jetson.state(),
        "runtime": subjects[0]["runtime"],
        "library": subjects[0]["library"],
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
    if cascades:
        document["cascades"] = cascades
    return document


def _judged(bundle: Bundle, folder: Path, engine: Backend, info: EngineInfo, plan: Plan) -> Tuple[Subject, Accuracy]:
    """Return the result of the golden self-test of an opened engine or cascade, and its accuracy."""
    subject: Subject = {
        "model": "compressed",
        "runtime": info.runtime,
        "precision": info.precision,
        "executed": engine.executed,
        "library": info.library,
        "golden": _golden(bundle, folder, engine),
    }
    accuracy: Accuracy = {"map50_95": None, "map50": None, "images": None}
    if plan.labelled is not None:
        accuracy = mean_ap(engine, plan.labelled, bundle)
    return subject, accuracy


def _cascade(bundle: Bundle, folder: Path, plan: Plan, digest: Optional[str]) -> CascadeRow:
    """Measure a cascade, and each of its models alone beside it. The timed images are its golden images, half of them handed over.

    Args:
        digest: digest of the images of --data.
    """
    (small, small_info), (large, large_info) = engines_of(folder)[1]
    threads = plan.threads if registry.RUNTIMES[small_info.runtime].takes_threads else None
    images = None
    say(f"{folder.name}: golden images{', mAP' if plan.labelled is not None else ''}")
    with open_engine(folder, threads=threads) as engine:
        subject, accuracy = _judged(bundle, folder, engine, joined(small_info, large_info), plan)
        assert bundle.cascade is not None, "`_golden` has checked it"
        kept, directory = bundle.cascade.kept, bundle.cascade.directory
        expected, pixels = golden.load(directory)
        detector = Detector(engine)
        handed = np.array([detector.margin(image) > 0 for image in pixels])
        if handed.all() or not handed.any():
            raise EngineError(
                f"{folder}: the router sends every golden image to the same model, so the latency of the other images cannot be "
                "measured; build the cascade again, with python3 build.py --force"
            )
        if plan.labelled is not None:
            images = len(plan.labelled)
            kept = sum(detector.margin(read_image(one.image)) <= 0 for one in plan.labelled) / images
    say(f"{folder.name}: latency, with its models alone")
    files = [directory / golden.FOLDER / image["file"] for image in expected["images"]]
    latency = cascade_latency(folder, [small, large], files, handed, 1 - kept, ROUNDS, plan.iterations, threads)
    return {
        **subject,
        **accuracy,
        **latency,
        "kept": kept,
        "kept_images": images,
        "image_set": digest,
        "fps": throughput(folder, _mixed(pixels, handed, 1 - kept)),
    }


def _mixed(images: Sequence[np.ndarray], handed: np.ndarray, share: float) -> List[np.ndarray]:
    """Return `MIXED` references to images, of which this share is handed over, evenly spread."""
    kinds = [[image for image, one in zip(images, handed) if one == kind] for kind in (False, True)]
    turns = [int((i + 1) * share) > int(i * share) for i in range(MIXED)]
    return [kinds[turn][i % len(kinds[turn])] for i, turn in enumerate(turns)]


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


def _missing(bundle: Bundle, runtime: str, labelled: bool) -> MissingRow:
    """Return a row for a runtime that was not measured here, with the reason. It has the keys of the other rows.

    Args:
        labelled: whether the other rows have an mAP, so that they have `per_class` too.
    """
    empty: Dict[str, object] = {key: None for key in MeasuredRow.__annotations__ if labelled or key != "per_class"}
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
