"""Whole chains of shipped recipes over seeds and variants: what each stage keeps, and whether the gate passes.

    python benchmarks/chains.py --recipe neu_det --seeds 0 1 2 -- run.threads=1
    python benchmarks/chains.py --recipe neu_det --variant shipped --variant "no distill: distill=null prune.epochs=40"

A variant is a name, and after a colon the knobs that differ. Knobs after `--` are those of every run. All runs share the store in
`--folder`, so stages that are equal run once, and a killed benchmark continues. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from yolo_compress.store import environment

STAGES = ("baseline", "prune", "distill", "qat")


def run(folder: Path, recipe: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Run one chain up to its report. Return mAP50-95 by stage, the gate, and the minutes of all stages."""
    words = ["run", f"recipe={recipe}", f"run.seed={seed}", *overrides]
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "yolo_compress", *words], cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, check=False
        )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}, see {folder / 'log.txt'}")
    answer = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((Path(folder, answer["report"]).parent / "report.json").read_text())
    return {
        "passed": done.returncode == 0,
        "stages": {row["stage"]: row["map50_95"] for row in report["chain"]},
        "judged": {one["id"]: one["retention"] for one in report["gate"]["judged"]},
        "retention": report["gate"]["retention"],
        "control": report["control"],
        "minutes": sum(row["seconds"] for row in report["chain"]) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["bccd", "neu_det"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variant", action="append", help="NAME[: section.key=value ...]; default: shipped")
    parser.add_argument("--folder", type=Path, default=Path("chains"))
    parser.add_argument("overrides", nargs="*", help="section.key=value of every run; give them after --")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    runs = []
    for recipe in options.recipe:
        for variant in options.variant or ["shipped"]:
            name, _, knobs = variant.partition(":")
            for seed in options.seeds:
                found = run(options.folder, recipe, seed, [*options.overrides, *knobs.split()])
                runs.append({"recipe": recipe, "variant": name, "seed": seed, **found})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    print(f"| recipe | variant | seed | {' | '.join(STAGES)} | worst INT8 row keeps | gate | minutes |")
    print("|---" * (len(STAGES) + 6) + "|")
    for one in runs:
        stages = " | ".join(f"{one['stages'][stage]:.3f}" if stage in one["stages"] else "" for stage in STAGES)
        verdict = "passed" if one["passed"] else "failed"
        print(
            f"| {one['recipe']} | {one['variant']} | {one['seed']} | {stages} | {100 * one['retention']:.1f} % | {verdict} "
            f"| {one['minutes']:.0f} |"
        )
    settings = {key: value for key, value in vars(options).items() if key != "folder"}
    print(json.dumps({"settings": settings, "runs": runs, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
