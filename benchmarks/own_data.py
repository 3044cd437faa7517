"""The way of a new user: `init` on a small data set of other classes than the checkpoint's, then the command that it prints.

    python benchmarks/own_data.py --data bccd.yaml neu_det.yaml --weights yolov8n_coco.pt --train 55 --val 15 --seeds 0 1
    python benchmarks/own_data.py --data bccd.yaml --weights yolov8n_coco.pt -- data.imgsz=320     # knobs of the run

A seed chooses the images of both splits. Each run has a folder of its own under `--folder`, so a killed one continues. Prints a
markdown table (the gate, what the row that decides keeps, what the engines keep on all validation images of the set that was drawn
from, minutes of `init` and run together), and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from yolo_compress.data.dataset import Dataset, Sample, load
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.runtime.engine import open_engine
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def draw(dataset: Dataset, folder: Path, counts: dict[str, int], seed: int) -> None:
    """A data set of some of the images, and its data.yaml."""
    for split, samples in (("train", dataset.train), ("val", dataset.val)):
        chosen: list[Sample] = random.Random(seed).sample(list(samples), min(counts[split], len(samples)))
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for sample in chosen:
            shutil.copy(sample.image, folder / "images" / split / sample.image.name)
            rows = "".join(" ".join(map(str, box)) + "\n" for box in sample.boxes)
            (folder / "labels" / split / f"{sample.image.stem}.txt").write_text(rows)
    text = {"path": ".", "train": "images/train", "val": "images/val", "names": dict(enumerate(dataset.names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(text))


def command(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document of a command."""
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "yolo_compress", *words], cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, check=False
        )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}, see {folder / 'log.txt'}")
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def on_all(results: Path, name: str) -> dict[str, float]:
    """mAP50-95 of the baseline on every validation image of the set that was drawn from, and what the engines keep of it."""
    data = load(name)
    engines = sorted(
        folder for kind in ("fp32", "int8") for folder in (results / "engine" / "compressed").glob(f"*-{kind}")
    )
    with open_engine(engines[0]) as engine:
        imgsz = engine.imgsz
    with TorchBackend(checkpoint.load_model(results / "baseline" / "model.pt"), data.names, imgsz) as torch_side:
        baseline = float(accuracy(torch_side, data.val, data.names, imgsz)["map50_95"])
    found = {"images": float(len(data.val)), "baseline": baseline}
    for folder in engines:
        with open_engine(folder) as engine:
            found[folder.name] = float(accuracy(engine, data.val, data.names, imgsz)["map50_95"]) / baseline
    return found


def measured(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One walk."""
    folder = options.folder / f"{Path(name).stem}-{seed}"
    if not (folder / "data").is_dir():
        draw(load(name), folder / "data", {"train": options.train, "val": options.val}, seed)
    started = time.monotonic()
    if not (folder / "mine.yaml").is_file():
        words = [
            f"data.yaml={folder.absolute() / 'data' / 'data.yaml'}",
            f"weights={find_weights(options.weights).absolute()}",
        ]
        command(folder, "init", *words, f"target={options.target}", "out=mine.yaml")
    code, answer = command(folder, "run", "recipe=mine.yaml", *options.overrides)
    report = json.loads((Path(folder, answer["report"]).parent / "report.json").read_text())
    gate = answer["metrics"]["gate"]
    return {
        "data": name,
        "seed": seed,
        "passed": code == 0,
        "on_all": on_all(folder / "weights" / "mine", name),
        "gate": gate,
        "stages": {row["stage"]: row.get("map50_95") for row in report.get("chain", [])},
        "minutes": (time.monotonic() - started) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["bccd.yaml", "neu_det.yaml"])
    parser.add_argument("--weights", default="yolov8n_coco.pt")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--train", type=int, default=55, help="training images")
    parser.add_argument("--val", type=int, default=15, help="validation images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("own_data"))
    parser.add_argument("overrides", nargs="*", help="section.key=value of the run; give them after --")
    options = parser.parse_args()
    runs = []
    for name in options.data:
        for seed in options.seeds:
            runs.append(measured(options, name, seed))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    print("| data | seed | gate | retention | on all | minutes |\n|---|---|---|---|---|---|")
    for run in runs:
        verdict = "passed" if run["passed"] else "failed"
        kept = {name: round(value, 4) for name, value in run["on_all"].items()}
        print(
            f"| {run['data']} | {run['seed']} | {verdict} | {run['gate'].get('retention')} | {kept} | {run['minutes']:.0f} |"
        )
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    print(json.dumps({"settings": settings, "runs": runs, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
