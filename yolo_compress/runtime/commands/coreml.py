"""`python3 check.py`: check CoreML packages on a Mac: golden self-test, latency, and mAP over labelled images.

Exit code 1: the detections of a package differ from those of its ONNX file. This program was never run on a Mac, only with a
stand-in for CoreML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, TypedDict

import numpy as np

from .. import json_text
from ..backends.base import EngineInfo
from ..backends.coreml import RUNTIME, CoreMLBackend
from ..detect.pre import letterbox
from ..errors import EngineError
from ..files import sha256_file
from ..measure import golden
from ..measure.device import cpu_model
from ..measure.groundtruth import Labelled, yolo_folder
from ..measure.latency import measure, percentiles
from .bench import mean_ap
from .bundle import HERE
from .command_line import Parser, answer, positive, run_command, say

ABOUT = "coreml.json"
SUFFIX = ".mlpackage"
WARMUP_MS, WARMUP_N = 200.0, 10


class About(TypedDict):
    """The document coreml.json."""

    names: List[str]  # class names in the order of their index
    imgsz: List[int]  # [height, width] of the input, px
    channels: int  # channels of the input
    max_det: int  # largest number of detections per image after NMS
    needs_nms: bool  # whether the boxes need NMS
    packages: Dict[str, str]  # folder of a package -> precision. `-nms` in a name: with NMS inside
    files: Dict[str, str]  # file -> SHA-256


class Model(NamedTuple):
    """What `bench.mean_ap` reads of a bundle."""

    names: Tuple[str, ...]
    max_det: int


class Row(TypedDict):
    """The result of one package."""

    package: str
    executed: str  # number types of the convolutions, as stored
    golden: str  # "passed", or how the detections differ
    latency_p50_ms: Optional[float]
    map50_95: Optional[float]  # a fraction; null without --data


def main(argv: Optional[Sequence[str]] = None, directory: Path = HERE) -> int:
    """Check every package, print a table and a JSON line, and return the exit code."""
    parser = Parser(prog="check.py", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images/ and labels/ (YOLO): also measure mAP")
    parser.add_argument("--iterations", type=positive, default=1000, help="timed calls per package (default 1000)")
    options = parser.parse_args(argv)

    def action() -> int:
        about = read_about(directory)
        labelled = None if options.data is None else yolo_folder(options.data, len(about["names"]))
        rows = [check(directory, name, about, labelled, options.iterations) for name in about["packages"]]
        for row in rows:
            figures = (f"p50 {row['latency_p50_ms']} ms", f"mAP50-95 {row['map50_95']}", f"golden {row['golden']}")
            answer("  ".join((row["package"].ljust(24),) + figures))
        answer(json.dumps({"device": cpu_model(), "rows": rows}))
        return 0 if all(row["golden"] == "passed" for row in rows) else 1

    return run_command(action)


def read_about(directory: Path) -> About:
    """Read coreml.json, and check every file that it lists.

    Raises:
        EngineError: the document is damaged, or a file is missing or altered.
    """
    try:
        about: About = json_text.read(directory / ABOUT)
        files, packages = dict(about["files"]), set(about["packages"])
        altered = [name for name in files if sha256_file(directory / name) != files[name]]
        found = {
            file.relative_to(directory).as_posix()
            for name in packages
            for file in (directory / name).rglob("*")
            if file.is_file()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{directory / ABOUT}: damaged, or a file that it lists is missing ({error}); copy the folder again"
        ) from error
    altered += sorted(found - set(files))
    if altered:
        raise EngineError(
            f"{directory / altered[0]}: altered, its sha256 is not the one in {ABOUT}; copy the folder again"
        )
    return about


def check(directory: Path, name: str, about: About, labelled: Optional[List[Labelled]], iterations: int) -> Row:
    """Check one package and return its row. A package with NMS must give the same detections."""
    say(f"{name}: golden images, latency{'' if labelled is None else ', mAP'}")
    precision = about["packages"][name]
    imgsz = (about["imgsz"][0], about["imgsz"][1])
    info = EngineInfo(
        RUNTIME,
        precision,
        imgsz,
        tuple(about["names"]),
        "",
        "",
        options={"channels": about["channels"]},
        needs_nms=about["needs_nms"],
    )
    with CoreMLBackend.of_package(directory / name, info) as engine:
        return _measure(directory, name, engine, about, labelled, iterations)


def _measure(
    directory: Path, name: str, engine: CoreMLBackend, about: About, labelled: Optional[List[Labelled]], iterations: int
) -> Row:
    info, imgsz = engine.info, engine.imgsz
    test = golden.check(directory, engine, info)
    images = golden.load(directory)[1]
    one = [letterbox(image, imgsz, channels=engine.channels)[0][None] for image in images]
    calls = [engine.bind(np.repeat(image, engine.batch or 1, axis=0)) for image in one]
    samples = measure(calls[0], iterations, WARMUP_MS, WARMUP_N, calls)
    score = None if labelled is None else mean_ap(engine, labelled, Model(info.names, about["max_det"]))["map50_95"]
    return {
        "package": name,
        "executed": engine.executed,
        "golden": test["reason"] or "passed",
        "latency_p50_ms": percentiles(samples.tolist())["latency_p50_ms"],
        "map50_95": score,
    }
