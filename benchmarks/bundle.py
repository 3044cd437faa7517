"""What a bundle costs a robot: KiB beside networks and golden inputs, and the time from a command to its first detections.

    yolo-compress bundle recipe=bccd out=robot && python3 robot/build.py
    python benchmarks/bundle.py robot                                        # --python: of an environment like the robot's

Each start is a process of its own: `detect.py golden/0.npy`, by turns with one that only imports the engine library and loads the
engine. The difference of their medians is the overhead: verifying, importing, reading, letterbox, inference, NMS, printing. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from yolo_compress.store import environment

LOAD = "import sys; sys.path.insert(0, sys.argv[1]); from runtime.engine import open_engine; open_engine(sys.argv[2])"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime-int8")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--starts", type=int, default=15)
    options = parser.parse_args()
    bundle: Path = options.bundle
    files = [file for file in bundle.rglob("*") if file.is_file() and "engines" not in file.relative_to(bundle).parts]
    own = [file for file in files if file.parent.name not in ("onnx", "golden") and file.name != "device.json"]
    detect = [options.python, str(bundle / "detect.py"), str(bundle / "golden/0.npy"), "--engine", options.engine]
    load = [options.python, "-B", "-c", LOAD, str(bundle), str(bundle / "engines" / options.engine)]
    both = [(seconds(detect), seconds(load)) for _ in range(options.starts + 1)][1:]
    whole, loading = np.median(np.array(both), axis=0)
    answer = {
        "engine": options.engine,
        "starts": options.starts,
        "detect_s": round(float(whole), 3),
        "load_s": round(float(loading), 3),
        "overhead_s": round(float(whole - loading), 3),
        "bundle_kib": round(sum(file.stat().st_size for file in own) / 1024, 1),
        "whole_mib": round(sum(file.stat().st_size for file in files) / 2**20, 1),
        "environment": environment.describe(),
    }
    print(
        f"to the first detections {answer['detect_s']} s, of it {answer['load_s']} s to load the engine and its library"
    )
    print(f"{answer['bundle_kib']} KiB beside networks and golden inputs, {answer['whole_mib']} MiB in all")
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
