"""The chain up to `qat` in one process and in several ranks on the CPU, with the same total batch: mAP50-95 of each stage.

    python benchmarks/ranks.py recipe=bccd data.imgsz=160 sparsify.epochs=2 prune.epochs=6 prune.rounds=2 distill.epochs=3 \\
      qat.epochs=1 run.threads=1

Other words go to both commands. Ranks compare their weights after each epoch and stop if a bit differs, so a chain that ends had
equal weights. Each chain starts in an empty folder. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from yolo_compress.store.store import Store

STAGES = ("baseline", "sparsify", "prune", "distill", "qat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    alone = measured(args.words, [])
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks), "-m"]
    together = measured(args.words, launcher)
    print(f"| stage | one process | {args.ranks} ranks | difference |\n|---|---|---|---|")
    for stage, value in alone.items():
        if stage in STAGES:
            print(f"| {stage} | {value:.3f} | {together[stage]:.3f} | {together[stage] - value:+.3f} |")
    print(json.dumps({"ranks": args.ranks, "words": args.words, "alone": alone, "together": together}))


def measured(words: list[str], launcher: list[str]) -> dict[str, float]:
    """Run the chain. Return the mAP50-95 of each stage, and the seconds."""
    with tempfile.TemporaryDirectory() as home:
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", *launcher, "yolo_compress", "qat", *words],
            env={**os.environ, "YOLO_COMPRESS_HOME": home},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found = {"seconds": time.monotonic() - start}
        store, name = Store(Path(home) / "weights"), Path(words[0].removeprefix("recipe=")).stem
        for stage in STAGES:
            if artifact := store.linked(name, stage):
                found[stage] = float(artifact.metrics["map50_95"])
        return found


if __name__ == "__main__":
    main()
