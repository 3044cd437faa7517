"""Peak memory of distilling YOLOv8l to YOLOv8s, beside training the student alone: each in a process of its own, some steps.

    python benchmarks/distillation_memory.py --data bccd.yaml --imgsz 640 --batch 2 --steps 4

Nets of the given shapes with random weights: memory and time of a step do not depend on what they know. The bar: above plain
training no more than the teacher's weights and the peak of its forward pass alone (its own process, less what stands before).
Peaks are of the resident set as the kernel counts it (`ru_maxrss`). Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from trainer_overhead import HookedTrainer, timed

from yolo_compress.data.dataset import load
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen
from yolo_compress.store import environment
from yolo_compress.train import checkpoint
from yolo_compress.train.trainer import TrainSettings

KINDS = ("plain", "distilled", "teacher")


def peak_now_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(args: argparse.Namespace) -> dict[str, float]:
    """Of this process: steps of training, or forward passes of the teacher alone."""
    dataset = load(args.data, limit_train=args.batch * args.steps, limit_val=args.batch)
    names = list(dataset.names)
    torch.set_num_threads(args.threads)
    if args.one == "teacher":
        images_BCHW = torch.rand(args.batch, 3, args.imgsz, args.imgsz)
        checkpoint.new_model(args.student, names, 3, 0)  # what importing and a net of its kind cost stands before
        before = peak_now_mib()
        source = Frozen(checkpoint.new_model(args.teacher, names, 3, 1))
        source.net.to(memory_format=torch.channels_last)
        for _ in range(args.steps):
            source.outputs(images_BCHW, {})
        return {"mib": peak_now_mib() - before}
    settings = TrainSettings(
        epochs=1, batch=args.batch, imgsz_px=args.imgsz, optimizer="AdamW", lr0=1e-3, threads=args.threads, amp=False
    )
    hooks = []
    if args.one == "distilled":
        hooks = [
            Teach(
                Frozen(checkpoint.new_model(args.teacher, names, 3, 1)),
                feature_weight=0.3,
                class_weight=0.5,
                box_weight=3.0,
            )
        ]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = HookedTrainer(
            checkpoint.new_model(args.student, names, 3, 0), dataset, settings, hooks, Path(scratch), args.one
        )
        try:
            steps = timed(trainer)
        finally:
            trainer.close()
    return {"mib": peak_now_mib(), "step_s": sorted(steps)[len(steps) // 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--student", default="yolov8s.yaml")
    parser.add_argument("--teacher", default="yolov8l.yaml")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args)))
        return
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=dict(os.environ), text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    more = found["distilled"]["mib"] - found["plain"]["mib"]
    print("| what | peak, MiB | step, s |\n|---|---|---|")
    for kind in ("plain", "distilled"):
        print(f"| {args.student} {kind} | {found[kind]['mib']:.0f} | {found[kind]['step_s']:.2f} |")
    print(f"| more by the teacher | {more:.0f} | |")
    print(f"| the teacher's weights and forward alone | {found['teacher']['mib']:.0f} | |")
    print(json.dumps({"found": found, "more_mib": more, "settings": vars(args), "environment": environment.describe()}))


if __name__ == "__main__":
    main()
