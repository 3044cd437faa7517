"""Every runtime in every precision for one recipe: size, mAP, drop and latency, as the stage `bench` measured them.

    python benchmarks/runtimes.py --recipe bccd
    python benchmarks/runtimes.py --recipe bccd --again -- bench.rounds=12 bench.iterations=720 bench.threads=2

`bench` evaluates all engines by the same code on the same images, and times them in turn, one process an engine. Stages that are not
up to date run first; `--again` measures again. The drop of mAP50-95 is against FP32 on the same runtime, with its 95 % interval over
resamplings of the validation images (paired). Faster: median over the rounds of the ratio of medians, to FP32 on the same runtime
and to torch. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from yolo_compress import home
from yolo_compress.evaluate.bootstrap import interval
from yolo_compress.evaluate.coco import absolute_boxes
from yolo_compress.evaluate.rows import MeasuredBenchRow, bench_rows
from yolo_compress.evaluate.stored_detections import kept, row_name
from yolo_compress.pipeline import run
from yolo_compress.preflight import prepare
from yolo_compress.recipe.recipe import load
from yolo_compress.report import numbers
from yolo_compress.report.intervals import resampled
from yolo_compress.runtime.max_detections import counted
from yolo_compress.store import environment
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store


def ratio(rounds_ms: Mapping[str, Sequence[Sequence[float]]], of: str, to: str) -> float:
    """Return how many times as fast `of` is as `to`."""
    medians = {name: np.array([np.median(one) for one in rounds_ms[name]]) for name in (of, to)}
    return float(np.median(medians[to] / medians[of]))


def compared(
    bench: Artifact, rows: Sequence[MeasuredBenchRow], map_R: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Return a row for each engine, with its drop and its speed."""
    rounds_ms = json.loads(bench.file("latency.json").read_text())
    found: list[dict[str, Any]] = []
    for row in rows:
        name, torch = row_name(row), row_name({**row, "runtime": "torch", "precision": "fp32"})
        own = next(one for one in rows if (one["runtime"], one["precision"]) == (row["runtime"], "fp32"))
        float32 = row_name(own)
        found.append({
            "runtime": row["runtime"], "precision": row["precision"], "executed": row["executed"], "size_mib": row["size_mib"],
            "map50_95": row["map50_95"], "drop": own["map50_95"] - row["map50_95"],
            "drop_interval": interval(map_R[float32] - map_R[name]), "p50_ms": row["latency_p50_ms"], "n": row["latency_n"],
            "quiet": row["latency_quiet"], "faster": ratio(rounds_ms, name, float32),
            "faster_than_torch": ratio(rounds_ms, name, torch),
        })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bccd")
    parser.add_argument("--model", choices=["original", "compressed"], default="compressed")
    parser.add_argument("--again", action="store_true", help="measure again, even if the stage bench is up to date")
    parser.add_argument("--resamplings", type=int, default=400)
    parser.add_argument("overrides", nargs="*", help="section.key=value; give them after --")
    args = parser.parse_args()
    pairs = [(key, value) for key, _, value in (text.partition("=") for text in args.overrides)]
    store, given = Store(home.weights()), load(args.recipe, pairs)
    bench = run(given, "bench", store=store, again=args.again)
    recipe, dataset = prepare(given, store)
    rows = [row for row in bench_rows(bench) if row["status"] == "ok" and row["model"] == args.model]
    if any((row["runtime"], "fp32") not in {(one["runtime"], one["precision"]) for one in rows} for row in rows):
        parser.error("a drop is against FP32 on the same runtime: add fp32 to export.precisions")
    most, images = counted(recipe.data.max_det), len(dataset.val)
    detections = {row_name(row): kept(bench.file(f"detections/{row_name(row)}.npy"), images) for row in rows}
    truths = [absolute_boxes(sample) for sample in dataset.val]
    map_R = resampled(truths, detections, len(dataset.names), args.resamplings, recipe.run.seed, most)
    made, described = compared(bench, rows, map_R), environment.describe()
    size, device = " x ".join(map(str, recipe.data.imgsz_hw)), bench.metrics["device"]
    print(
        f"{recipe.name}, {args.model}, {size} px, {images} images; {described['cpu']}, load {device['load_average']}\n"
    )
    print("| runtime | precision | MiB | mAP50-95 | drop (95 %) | p50 ms | faster than its FP32 | than torch | quiet |")
    print("|---" * 9 + "|")
    for row in made:
        low, high = row["drop_interval"]
        drop = "" if row["precision"] == "fp32" else f"{row['drop']:+.4f} ({low:+.4f} to {high:+.4f})"
        print(
            f"| {numbers.runtime(row['runtime'])} | {row['precision']} | {row['size_mib']:.1f} | {row['map50_95']:.4f} "
            f"| {drop} | {row['p50_ms']:.2f} | {row['faster']:.2f}x "
            f"| {row['faster_than_torch']:.2f}x | {row['quiet']} |"
        )
    missing = [row for row in bench_rows(bench) if row["status"] == "missing" and row["model"] == args.model]
    for row in missing:
        print(f"\n{numbers.runtime(row['runtime'])} {row['precision']}: {row['reason']}")
    print(json.dumps({"settings": vars(args), "rows": made, "environment": described}))


if __name__ == "__main__":
    main()
