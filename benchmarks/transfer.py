"""Transfer from a checkpoint of other classes: our `baseline.pretrained` beside Ultralytics' own training of the same epochs.

    python benchmarks/transfer.py --data bccd.yaml --pretrained yolov8n_coco.pt --imgsz 320 --epochs 30 --seeds 0 1 2
    python benchmarks/transfer.py --who theirs --out theirs.json     # one side alone; a file given is continued

Theirs is `YOLO(checkpoint).train(data=..., epochs=..., imgsz=..., batch=..., seed=...)` with every other setting as Ultralytics
ships it. Ours is `yolo-compress baseline baseline.pretrained=... baseline.epochs=... run.seed=...` with the defaults of the
section. mAP50-95 by pycocotools over square letterboxes for both; ours is the last EMA, theirs the last EMA and, beside it,
`best.pt`, which Ultralytics chooses on these validation images. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer_overhead import copy_for_ultralytics

from yolo_compress import load, run
from yolo_compress.data.dataset import Dataset
from yolo_compress.data.dataset import load as load_data
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def theirs(options: argparse.Namespace, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Ultralytics' own training; figures of `last.pt` and `best.pt`."""
    from ultralytics import YOLO

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        YOLO(str(find_weights(options.pretrained))).train(
            data=str(copy_for_ultralytics(dataset, folder / "data")),
            epochs=options.epochs, imgsz=options.imgsz, batch=options.batch, seed=seed,
            device="cpu", workers=0, cache="ram", plots=False, project=str(folder), name="run", verbose=False,
        )  # fmt: skip
        seconds = time.monotonic() - started
        found = {
            name: measured(folder / "run" / "weights" / f"{name}.pt", dataset, options.imgsz)
            for name in ("last", "best")
        }
    return {"seed": seed, "map50_95": found["last"], "best_on_val": found["best"], "seconds": seconds}


def measured(file: Path, dataset: Dataset, imgsz: int) -> float:
    """mAP50-95 of a checkpoint over square letterboxes."""
    size = (imgsz, imgsz)
    with TorchBackend(checkpoint.load_model(file), dataset.names, size) as backend:
        return float(accuracy(backend, dataset.val, dataset.names, size)["map50_95"])


def ours(options: argparse.Namespace, dataset: Dataset, seed: int) -> dict[str, Any]:
    """`yolo-compress baseline`, with the defaults of its section."""
    chosen = load(
        "custom",
        [
            ("data.yaml", options.data),
            ("data.imgsz", str(options.imgsz)),
            ("baseline.pretrained", options.pretrained),
            ("baseline.epochs", str(options.epochs)),
            ("baseline.batch", str(options.batch)),
            ("run.seed", str(seed)),
            *(tuple(text.split("=", 1)) for text in options.overrides),
        ],
    )
    artifact = run(chosen, "baseline")
    return {"seed": seed, "map50_95": artifact.metrics["map50_95"], "seconds": artifact.manifest.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--pretrained", default="yolov8n_coco.pt")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--who", choices=("ours", "theirs", "both"), default="both")
    parser.add_argument("--out", type=Path, help="JSON file that keeps what is measured and is continued")
    parser.add_argument("overrides", nargs="*", help="section.key=value for ours; give them before the options")
    options = parser.parse_args()
    dataset = load_data(options.data)
    runs: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    if options.out and options.out.is_file():
        runs = json.loads(options.out.read_text())["runs"]
    for seed in options.seeds:
        for who, measure in (("theirs", theirs), ("ours", ours)):
            if options.who in (who, "both") and all(row["seed"] != seed for row in runs[who]):
                runs[who].append(measure(options, dataset, seed))
                print(f"{who}, seed {seed}: {runs[who][-1]}", file=sys.stderr, flush=True)
                if options.out:
                    options.out.write_text(json.dumps({"runs": runs}))
    print("| training | mAP50-95 of the last EMA | each seed | best on these images | seconds |\n|---|---|---|---|---|")
    for who, rows in runs.items():
        if rows:
            mean = statistics.mean(row["map50_95"] for row in rows)
            each = ", ".join(f"{row['map50_95']:.3f}" for row in rows)
            best = f"{statistics.mean(row['best_on_val'] for row in rows):.3f}" if "best_on_val" in rows[0] else "-"
            print(f"| {who} | {mean:.4f} | {each} | {best} | {statistics.mean(row['seconds'] for row in rows):.0f} |")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    print(json.dumps({"settings": settings, "runs": runs, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
