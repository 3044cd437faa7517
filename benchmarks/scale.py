"""Time and memory at the size of COCO: 118,287 training and 5,000 validation images of 16 px, 80 classes, labels as many as COCO's.

    python benchmarks/scale.py make FOLDER       # the data set, 34 s
    python benchmarks/scale.py first FOLDER      # the first preflight, and one that is killed at half and goes on
    python benchmarks/scale.py start FOLDER      # cached: `status`, and what a stage does before its own work
    python benchmarks/scale.py matching FOLDER   # mAP of 5,000 images with 200 detections each
    python benchmarks/scale.py reading FOLDER    # 640 px JPEGs: reading and letterbox in threads against one after the other
    python benchmarks/scale.py ram FOLDER        # RAM cache of JPEGs, in threads against one after the other
    python benchmarks/scale.py report FOLDER     # error types, Ultralytics' AP and A/B of 5,000 images

CPU seconds are comparable on a machine that other processes use, wall times are not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from yolo_compress.data.samples import Sample
from yolo_compress.runtime.measure.device import usable_cpus
from yolo_compress.store import environment

TRAIN, VAL, CLASSES = 118_287, 5_000, 80
SIDE_PX = 16
BOXES = 7.3  # mean of an image in COCO
EMPTY = 0.0086  # fraction of COCO's training images without an object
DETECTIONS = 200  # of an image, at most 300 at a threshold of 0.001
JPEGS = 500
REPLICATES = 200
ROUNDS = 5
Row = dict[str, object]

KNOBS = ["data.yaml=scale.yaml", "baseline.model=yolov8n.yaml"]
PREPARE = """
from pathlib import Path
from yolo_compress import chain, preflight
from yolo_compress.recipe import recipe
from yolo_compress.store.store import Store
knobs = [("data.yaml", "scale.yaml"), ("baseline.model", "yolov8n.yaml")]
ready, data = preflight.prepare(recipe.load("custom", knobs), Store(Path("weights")))
chain.plan(ready, data, "report")
"""


def make(folder: Path, train: int, val: int) -> None:
    """Write a data set of `train` + `val` images into `folder`, with `scale.yaml`. Every image has bytes of its own."""
    import cv2

    generator = np.random.default_rng(0)
    share_K = 1 / np.arange(1, CLASSES + 1)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        images = generator.integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), np.uint8)
        boxes = np.minimum(generator.geometric(1 / BOXES, count), 93) * (generator.random(count) > EMPTY)
        classes = generator.choice(CLASSES, boxes.sum(), p=share_K / share_K.sum())
        sides = np.exp(generator.uniform(np.log(0.02), np.log(0.6), (boxes.sum(), 2)))
        centres = sides / 2 + generator.random((boxes.sum(), 2)) * (1 - sides)
        rows = [
            f"{k} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n"
            for k, (x, y), (w, h) in zip(classes.tolist(), centres.tolist(), sides.tolist(), strict=True)
        ]
        first = 0
        for number, (image, n) in enumerate(zip(images, boxes.tolist(), strict=True)):
            (folder / "images" / split / f"{number:012}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
            if n:
                (folder / "labels" / split / f"{number:012}.txt").write_text("".join(rows[first : first + n]))
            first += n
    names = [f"class {k}" for k in range(CLASSES)]
    (folder / "scale.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(names)}\n")


def run(command: Sequence[str], folder: Path, stop_at: int | None = None) -> Row:
    """Run a command in the folder. Return its wall and CPU seconds, its memory and how many images it read.

    Args:
        command: arguments of Python.
        folder: folder of the data set.
        stop_at: number of images read after which it gets SIGKILL.
    """
    start, read = time.perf_counter(), 0
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if line.startswith("check images: "):
            read = int(line.split()[2].split("/")[0])
            if stop_at and read >= stop_at:
                process.send_signal(signal.SIGKILL)
                break
    _, status, usage = os.wait4(process.pid, 0)
    if status and not stop_at:
        raise SystemExit(log)
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 2**10,
        "read": log[: log.find("/")].rpartition(" ")[2] if "check images" in log else "",
    }


def first(folder: Path) -> dict[str, Row]:
    """Time a first preflight; then kill one at half, and time the next."""
    cache = folder / "weights" / ".cache"
    rows = {}

    def forget() -> None:
        for file in cache.glob("data*"):
            file.unlink()

    forget()
    rows["first preflight"] = run(["-c", PREPARE], folder)
    forget()
    rows["killed at half"] = run(["-c", PREPARE], folder, stop_at=(TRAIN + VAL) // 2)
    rows["after the kill"] = run(["-c", PREPARE], folder)
    return rows


def start(folder: Path) -> dict[str, Row]:
    """Time commands on a data set that the cache knows."""
    run(["-c", PREPARE], folder)
    status = ["-m", "yolo_compress", "status", *KNOBS]
    commands = {"status": status, "before a stage": ["-c", PREPARE], "cfg": ["-m", "yolo_compress", "cfg", *KNOBS]}
    rows = [{name: run(command, folder) for name, command in commands.items()} for _ in range(ROUNDS)]
    return {name: min((row[name] for row in rows), key=lambda row: float(str(row["cpu_s"]))) for name in commands}


def invented(models: int) -> tuple[list[np.ndarray], list[list[np.ndarray]], list[SimpleNamespace]]:
    """Return ground truth as boxes in px, the detections of each model, and ground truth as in `coco.Truth`."""
    from ab import detected, scene

    generator = np.random.default_rng(0)
    scenes = scene(VAL, CLASSES, generator)
    found = [detected(scenes, VAL * DETECTIONS, CLASSES, generator) for _ in range(models)]
    truths = []
    for rows_N5 in scenes:
        centres, sides = (rows_N5[:, 1:3] + rows_N5[:, 3:]) / 1280, (rows_N5[:, 3:] - rows_N5[:, 1:3]) / 640
        boxes = [(int(k), *c, *s) for k, c, s in zip(rows_N5[:, 0], centres.tolist(), sides.tolist(), strict=True)]
        truths.append(SimpleNamespace(width=640, height=640, boxes=tuple(boxes)))
    return scenes, found, truths


def once(work: Callable[[], object]) -> Row:
    """Return the CPU seconds of a call, and the peak memory of this process after it."""
    began = time.process_time()
    work()
    return {
        "cpu_s": time.process_time() - began,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def matching(folder: Path) -> dict[str, Row]:
    """Compute mAP of invented detections."""
    from yolo_compress.evaluate.coco import mean_ap

    _, (found,), truths = invented(1)
    return {"matching": once(lambda: mean_ap(truths, found, [str(k) for k in range(CLASSES)]))}


def report(folder: Path) -> dict[str, Row]:
    """Compute what the report and `ab` compute from stored detections."""
    from yolo_compress.evaluate import tide
    from yolo_compress.evaluate.ab.comparison import compare
    from yolo_compress.evaluate.ultralytics_ap import ultralytics_ap

    scenes, both, truths = invented(2)
    names = [str(k) for k in range(CLASSES)]
    ultralytics_ap(truths[:2], both[0][:2], names)  # imports
    return {
        "error types": once(lambda: tide.errors(scenes, both[0])),
        "Ultralytics' AP": once(lambda: ultralytics_ap(truths, both[0], names)),
        f"A/B, {REPLICATES} replicates": once(lambda: compare(scenes, *both, names, replicates=REPLICATES)),
    }


def alternating(ways: dict[str, Callable[[], None]]) -> dict[str, Row]:
    """Return the median wall and CPU seconds of several ways to do the same, measured in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {"wall_s": float(np.median([w for w, _ in rows])), "cpu_s": float(np.median([c for _, c in rows]))}
        for name, rows in times.items()
    }


def jpegs(folder: Path, count: int) -> list[Sample]:
    """Write noisy JPEGs of 640 x 480 px into the folder."""
    import cv2

    generator = np.random.default_rng(0)
    samples = []
    for i in range(count):
        small = generator.integers(0, 256, (30, 40, 3), np.uint8)
        rough = cv2.resize(small, (640, 480), interpolation=cv2.INTER_CUBIC)
        image = np.clip(rough + generator.normal(0, 8, rough.shape), 0, 255).astype(np.uint8)
        file = folder / f"{i}.jpg"
        cv2.imwrite(str(file), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        samples.append(Sample(file, 640, 480, ((0, 0.5, 0.5, 0.5, 0.5),), str(i)))
    return samples


def reading(folder: Path) -> dict[str, Row]:
    """Read and letterbox JPEGs as `accuracy` does, in one thread and in one for each processor."""
    import cv2

    from yolo_compress.evaluate import accuracy
    from yolo_compress.runtime.detect import pre
    from yolo_compress.runtime.detect.detector import Detector

    with tempfile.TemporaryDirectory() as scratch:
        samples = jpegs(Path(scratch), JPEGS)
        cv2.setNumThreads(1)
        detector = Detector(SimpleNamespace(batch=None, channels=3, imgsz=(640, 640)))  # type: ignore[arg-type]

        def prepare(workers: int) -> None:
            for _ in accuracy._prepared(detector, samples, workers):
                pass

        def native() -> None:
            """Only what runs without Python's lock: decoding and the planes of the letterbox."""
            canvas = np.zeros((3, 480, 640), np.float32)
            for sample in samples:
                decoded = cv2.imdecode(np.fromfile(sample.image, np.uint8), cv2.IMREAD_COLOR)
                pre._normalise(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), canvas)

        ways = {"one thread": lambda: prepare(1), "threads": lambda: prepare(usable_cpus()), "native": native}
        return alternating(ways) | machine(JPEGS)


def ram(folder: Path) -> dict[str, Row]:
    """Fill the RAM cache with JPEGs, as `trainer` does, and take it again as the next stage does."""
    from yolo_compress.train import dataset  # before ultralytics
    from ultralytics.cfg import get_cfg  # isort: skip

    args = get_cfg(overrides={"task": "detect", "mode": "train", "imgsz": 128})
    cores = usable_cpus()
    with tempfile.TemporaryDirectory() as scratch:
        samples = jpegs(Path(scratch), JPEGS)

        def fill(workers: int, forget: bool = True) -> None:
            if forget:
                dataset._decoded.clear()
            dataset.usable_cpus = lambda: workers
            data = {"nc": CLASSES, "channels": 3}
            dataset.PreflightDataset(samples, cache=True, imgsz=128, augment=True, hyp=args, data=data)

        ways = {
            "one thread": lambda: fill(1),
            "threads": lambda: fill(cores),
            "next stage": lambda: fill(cores, forget=False),
        }
        return alternating(ways) | machine(JPEGS)


def machine(images: int) -> dict[str, Row]:
    return {"machine": {"images": images, "threads": usable_cpus(), "load": os.getloadavg()[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = {one.__name__: one for one in (first, start, matching, reading, ram, report)}
    parser.add_argument("what", choices=["make", *measured])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=TRAIN, help="training images to make")
    parser.add_argument("--val", type=int, default=VAL)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.train, args.val)
        return
    rows = measured[args.what](args.folder)
    for name, row in rows.items():
        print(
            f"{name}: "
            + ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    print(json.dumps({"what": args.what, "rows": rows, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
