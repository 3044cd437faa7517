"""Whether `prune.latency_ms` is hit: shares of the dense network's time asked for, against the finished network's.

    python benchmarks/latency_budget.py --recipe bccd --runtimes onnxruntime openvino --shares 0.8 0.65 0.5

Each run is the command a user types, without fine-tuning, which moves no width. Afterwards each finished network is built
again and timed against the dense one in turn, in processes of their own. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from yolo_compress import environment, load, ultra
from yolo_compress.prune.latency import Rig
from yolo_compress.weights import find_weights


def asked(recipe: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yolo_compress", "prune", f"recipe={recipe}", "prune.epochs=0", *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dense_ms(recipe: str, runtime: str) -> float:
    """From the refusal of a budget that asks for nothing: the plan's own figure."""
    done = asked(recipe, "dry_run=true", "prune.latency_ms=1e5", f"prune.latency_runtime={runtime}")
    found = re.search(r"as it is takes (\S+) ms", done.stderr)
    if not found:
        raise SystemExit(done.stderr)
    return float(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bccd")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    args = parser.parse_args()
    recipe = load(args.recipe)
    size = recipe.data.imgsz_hw
    rows: list[dict[str, Any]] = []
    print(
        "| runtime | asked | of the dense | MACs kept | measured by prune | finished network, again |\n|---|---|---|---|---|---|"
    )
    for runtime in args.runtimes:
        before = dense_ms(args.recipe, runtime)
        for share in args.shares:
            limit = share * before
            done = asked(args.recipe, f"prune.latency_ms={limit:.4g}", f"prune.latency_runtime={runtime}")
            if done.returncode:
                print(
                    f"| {runtime} | {limit:.2f} ms | {share} | | {done.stderr.strip().splitlines()[-1]} | | |",
                    flush=True,
                )
                rows.append({"runtime": runtime, "share": share, "error": done.stderr.strip().splitlines()[-1]})
                continue
            answer = json.loads(done.stdout.splitlines()[-1])
            metrics = answer["metrics"]
            with tempfile.TemporaryDirectory() as scratch:
                model = ultra.load_model(Path(answer["artifact"]) / "model.pt")
                names = tuple(model.names.values())
                rig = Rig(Path(scratch), size, names, runtime, "fp32")
                dense = rig.engine(ultra.load_model(Path(find_weights(str(recipe.baseline.weights)))), "dense")
                own, whole = rig.times(rig.engine(model, "pruned"), dense)
                again = own / whole
            wanted = metrics["latency_target_ms"] / metrics["latency_dense_ms"]
            rows.append({"runtime": runtime, "share": share, "wanted_share": wanted, "again_share": again, "again_ms": own,
                         **{k: metrics[k] for k in metrics if k.startswith(("latency", "kept"))}})  # fmt: skip
            print(
                f"| {runtime} | {limit:.2f} ms | {wanted:.3f} | {metrics['kept_flops']:.3f} "
                f"| {metrics['latency_measured_ms']:.2f} ms ({metrics['latency_measured_ms'] / limit - 1:+.1%}) "
                f"| {own:.2f} ms ({own / limit - 1:+.1%}) | {again:.3f} ({again / wanted - 1:+.1%}) |",
                flush=True,
            )
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
