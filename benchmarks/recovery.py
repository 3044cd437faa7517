"""What pruning keeps of the mAP after fine-tuning: every budget with every seed, as a table with mean and standard deviation.

    python benchmarks/recovery.py --recipe bccd --seeds 0 1 2 --budgets 0.7:40 0.5:40 0.4:40 0.3:60

A budget is MACs kept and epochs. Each run is `yolo-compress prune recipe=... prune.keep_flops=... prune.epochs=... run.seed=...`
in this folder, so what is published already is not run again, and a killed run continues at its last epoch. Prints a
markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from yolo_compress import load, run
from yolo_compress.store import environment

STEPS = {"cut": "map50_95_after_cut", "re-estimated": "map50_95_after_bn", "trained": "map50_95"}


def measured(recipe: str, budget: str, seed: int, overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """One pruned net against the baseline that it came from."""
    keep, epochs = budget.split(":")
    own = [("prune.keep_flops", keep), ("prune.epochs", epochs), ("run.seed", str(seed))]
    chosen = load(recipe, [*overrides, *own])
    before = run(chosen, "baseline").metrics["map50_95"]
    metrics = run(chosen, "prune").metrics
    return {
        "keep_flops": float(keep),
        "epochs": int(epochs),
        "seed": seed,
        "baseline": before,
        "kept_flops": metrics["kept_flops"],
        "parameters": metrics["parameters"],
        **{step: metrics[name] for step, name in STEPS.items()},
        "retention": metrics["map50_95"] / before,
    }


def row(runs: list[dict[str, Any]]) -> str:
    """One line of the table over the seeds of a budget."""
    mean = {
        name: statistics.mean(run_[name] for run_ in runs) for name in ("kept_flops", "baseline", *STEPS, "retention")
    }
    each = ", ".join(f"{run_['retention']:.1%}" for run_ in runs)
    spread = f" ± {statistics.stdev(run_['trained'] for run_ in runs):.4f}" if len(runs) > 1 else ""
    steps = " | ".join(f"{mean[step]:.3f}" for step in STEPS)
    front = f"| {mean['kept_flops']:.3f} | {runs[0]['epochs']} | {mean['baseline']:.4f}"
    return f"{front} | {steps}{spread} | {mean['retention']:.1%} ({each}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bccd")
    parser.add_argument("--budgets", nargs="+", default=["0.7:40", "0.5:40", "0.4:40", "0.3:60"], help="keep:epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="section.key=value for every run; give them before the options")
    args = parser.parse_args()
    overrides = [(key, value) for key, _, value in (text.partition("=") for text in args.overrides)]
    print("| MACs kept | epochs | baseline | as cut | re-estimated | trained | kept of the mAP50-95 (each seed) |")
    print("|---|---|---|---|---|---|---|")
    every = []
    for budget in args.budgets:
        runs = [measured(args.recipe, budget, seed, overrides) for seed in args.seeds]
        every += runs
        print(row(runs), flush=True)
    print(json.dumps({"settings": vars(args), "runs": every, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
