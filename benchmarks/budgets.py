"""mAP50-95 over INT8 latency for several budgets of one recipe, and the budgets that keep 95, 98 and 99.5 % of the baseline.

    python benchmarks/budgets.py --recipe bccd-fast --keep-flops 0.7 0.5 0.35 0.25 0.15 --plot budgets.svg -- run.threads=1

Runs the whole chain for each budget (`prune.keep_flops`), as `chains.py` does; chains that are finished are not run again. Then times
the INT8 engines of all budgets and the baseline's FP32 engine: one process an engine, rounds in turn. Speeds are medians over rounds
of ratios of medians. Between two budgets, retention is interpolated. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import chains
import matplotlib.pyplot as plt
import numpy as np

from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.store import environment

LEVELS = (0.95, 0.98, 0.995)  # shares of the baseline's mAP50-95


def reached(rows: list[dict[str, Any]], level: float) -> tuple[float, float] | None:
    """Return the smallest budget that keeps `level` of the baseline's mAP, and its speed; None: no budget here keeps it.

    `rows` go from the largest budget to the smallest. If the smallest still keeps `level`, it is the answer.
    """
    if all(row["retention"] < level for row in rows):
        return None
    if rows[-1]["retention"] >= level:
        return rows[-1]["keep_flops"], rows[-1]["speed"]
    above, below = next(
        (a, b) for a, b in reversed(list(pairwise(rows))) if a["retention"] >= level > b["retention"]
    )  # fmt: skip
    share = (above["retention"] - level) / (above["retention"] - below["retention"])
    keep, speed = (above[key] + share * (below[key] - above[key]) for key in ("keep_flops", "speed"))
    return keep, speed


def plot(rows: list[dict[str, Any]], out: Path, title: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["ms"] for row in rows], [100 * row["retention"] for row in rows], marker="o", color="#1f6f8b")
    for row in rows:
        label = f"{row['keep_flops']:.0%} of MACs, {row['speed']:.1f}x"
        axes.annotate(
            label, (row["ms"], 100 * row["retention"]), xytext=(6, -12), textcoords="offset points", fontsize=9
        )
    for level in LEVELS:
        axes.axhline(100 * level, color="#999999", linewidth=0.6, linestyle="--")
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("INT8 latency, ms")
    axes.set_ylabel("mAP50-95, % of the baseline")
    axes.set_title(title, fontsize=10)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bccd-fast")
    parser.add_argument("--keep-flops", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25, 0.15])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", default="openvino")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samples", type=int, default=60, help="inferences a round")
    parser.add_argument("--plot", type=Path, help="file for the picture (.svg, .png)")
    parser.add_argument("--folder", type=Path, default=Path("chains"))
    parser.add_argument("overrides", nargs="*", help="section.key=value of every run; give them after --")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    engines: list[Path] = []
    for keep in sorted(options.keep_flops, reverse=True):
        found = chains.run(
            options.folder, options.recipe, options.seed, [*options.overrides, f"prune.keep_flops={keep}"]
        )
        built = (options.folder / "weights" / Path(options.recipe).stem / "engine").resolve()
        engines = engines or [built / f"original/{options.runtime}-fp32"]
        engines.append(built / f"compressed/{options.runtime}-int8")
        retention = found["judged"][f"compressed-{options.runtime}-int8"]
        rows.append(
            {"keep_flops": keep, "stages": found["stages"], "retention": retention, "worst": found["retention"]}
        )
    specs = [
        {"label": str(number), "engine": str(one), "threads": options.threads} for number, one in enumerate(engines)
    ]
    taken = [one["rounds_ms"] for one in measure_in_turn(specs, options.rounds, options.samples)]
    medians = np.array([[np.median(one) for one in each] for each in taken])
    for row, each in zip(rows, medians[1:], strict=True):
        row["ms"], row["speed"] = float(np.median(each)), float(np.median(medians[0] / each))
    print("| MACs kept | pruned | QAT | INT8 keeps | worst INT8 row keeps | INT8, ms | against the baseline's FP32 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['keep_flops']:.0%} | {row['stages']['prune']:.3f} | {row['stages']['qat']:.3f} | {row['retention']:.1%} "
            f"| {row['worst']:.1%} | {row['ms']:.2f} | {row['speed']:.2f}x |"
        )
    levels = {level: reached(rows, level) for level in LEVELS}
    print(f"\nbaseline, FP32: {np.median(medians[0]):.2f} ms")
    for level, found_at in levels.items():
        said = "at no budget here" if found_at is None else f"down to {found_at[0]:.0%} of the MACs, {found_at[1]:.1f}x"
        print(f"{level:.1%} of the mAP: {said}")
    if options.plot:
        plot(rows, options.plot, f"{options.recipe}, {options.runtime}, {options.threads} threads, seed {options.seed}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    answer = {
        "settings": settings,
        "rows": rows,
        "levels": levels,
        "device": device_state(),
        "environment": environment.describe(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
