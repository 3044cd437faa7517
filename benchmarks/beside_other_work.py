"""Training steps on a CPU, quiet and beside other programs: OpenMP threads wait as torch lets them, or as `yolo-compress` does.

    python benchmarks/beside_other_work.py --busy 0 2 --rounds 4 --steps 6

A step is forward and backward of a YOLOv8n, batch 8, 320 px, on all processors. Each measurement is a process of its own; settings
and loads take turns, and every second round goes in reverse order. `--busy` are numbers of processes that only compute. Prints a
markdown table of medians and ratios, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict

from yolo_compress.cli.main import OPENMP_WAIT
from yolo_compress.store import environment

STEP = """
import json, sys, time
import torch
from yolo_compress.train import checkpoint
model = checkpoint.new_model("yolov8n.yaml", ["a", "b"], 3, 0).train()
images = torch.rand(8, 3, 320, 320)
def tensors(value):
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)
def step():
    start = time.perf_counter()
    sum(one.square().mean() for one in tensors(model(images)) if one.requires_grad).backward()
    model.zero_grad()
    return time.perf_counter() - start
step()
print(json.dumps([step() for _ in range(int(sys.argv[1]))]))
"""


def seconds(settings: dict[str, str], busy: int, steps: int) -> list[float]:
    """Return the seconds of each step, beside `busy` processes that only compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(steps)], env={**clean, **settings}, stdout=subprocess.PIPE, text=True, check=True
        )  # fmt: skip
    finally:
        for other in others:
            other.kill()
            other.wait()
    return list(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    kinds = {"torch": {}, "ours": OPENMP_WAIT}
    turn = [(name, busy) for busy in options.busy for name in kinds]
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for name, busy in turn[:: -1 if number % 2 else 1]:
            found[name, busy].append(statistics.median(seconds(kinds[name], busy, options.steps)))
    print("| busy processes | torch's wait, s | ours, s | torch / ours |\n|---|---|---|---|")
    for busy in options.busy:
        theirs, ours = (statistics.median(found[name, busy]) for name in kinds)
        print(f"| {busy} | {theirs:.3f} | {ours:.3f} | {theirs / ours:.2f} |")
    medians = {f"{name}, {busy} busy": values for (name, busy), values in found.items()}
    print(json.dumps({"settings": vars(options), "medians_s": medians, "environment": environment.describe()}))


if __name__ == "__main__":
    main()
