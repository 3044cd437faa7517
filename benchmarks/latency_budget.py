"""Whether `prune.latency_ms` is hit: shares of the dense network's time asked for, against the finished network's.

    python benchmarks/latency_budget.py --recipe bccd --runtimes onnxruntime openvino --shares 0.8 0.65 0.5

Each run is the command a user types, without fine-tuning, which moves no width. Afterwards each finished network is built
again and timed against the dense one in turn, in processes of their own; its milliseconds are its share of the dense time, the
median over launches, times the dense network's quietest time. Prints a markdown table, and on the last line JSON; each try on stderr.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yolo_compress import load
from yolo_compress.prune.latency import Rig
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def asked(recipe: str, limit_ms: float, runtime: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yolo_compress", "prune", f"recipe={recipe}", "prune.epochs=0",
               f"prune.latency_ms={limit_ms:.4g}", f"prune.latency_runtime={runtime}"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bccd")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = table(args, Path(scratch))
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": environment.describe()}))


def table(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Prints the table; its rows as they go into the JSON."""
    recipe = load(args.recipe)
    model = checkpoint.load_model(Path(find_weights(str(recipe.baseline.weights))))
    names = tuple(model.names.values())
    rows: list[dict[str, Any]] = []
    columns = ("runtime", "asked", "of the dense", "MACs kept", "measured by prune", "finished network, again",
               "of the dense, again", "prune took")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for runtime in args.runtimes:
        rig = Rig(scratch / runtime, recipe.data.imgsz_hw, names, runtime, "fp32")
        rig.folder.mkdir()
        dense = rig.build_model(model, "dense")
        before = rig.fastest_ms(dense)
        print(f"{runtime}: dense {before:.2f} ms", file=sys.stderr, flush=True)
        for share in args.shares:
            limit = share * before
            begun = time.monotonic()
            done = asked(args.recipe, limit, runtime)
            seconds = time.monotonic() - begun
            tries = re.findall(r"prune: .* of the MACs take .*", done.stderr)
            print("\n".join(tries), file=sys.stderr, flush=True)
            if done.returncode:
                print(
                    f"| {runtime} | {limit:.2f} ms | {share} | | {done.stderr.strip().splitlines()[-1]} | | | {seconds:.0f} s |",
                    flush=True,
                )
                rows.append(
                    {"runtime": runtime, "share": share, "error": done.stderr.strip().splitlines()[-1], "tries": tries}
                )
                continue
            answer = json.loads(done.stdout.splitlines()[-1])
            metrics = answer["metrics"]
            pruned = checkpoint.load_model(Path(answer["artifact"]) / "model.pt")
            again = rig.compare(rig.build_model(pruned, "pruned"), dense)
            wanted = metrics["latency_target_ms"] / metrics["latency_dense_ms"]
            own = again.share * min(before, again.unpruned_ms)
            rows.append({"runtime": runtime, "share": share, "wanted_share": wanted, "again_share": again.share,
                         "again_ms": own, "again_dense_ms": again.unpruned_ms, "seconds": seconds, "tries": tries,
                         **{k: metrics[k] for k in metrics if k.startswith(("latency", "kept"))}})  # fmt: skip
            print(
                f"| {runtime} | {limit:.2f} ms | {wanted:.3f} | {metrics['kept_flops']:.3f} "
                f"| {metrics['latency_measured_ms']:.2f} ms ({metrics['latency_measured_ms'] / limit - 1:+.1%}) "
                f"| {own:.2f} ms ({own / limit - 1:+.1%}) | {again.share:.3f} ({again.share / wanted - 1:+.1%}) | {seconds:.0f} s |",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
