"""Time of a training step, in turn, in one run: a plain one of ours against Ultralytics' own, or a sparse, a fake-quantised or
a mixed-precision one against a plain one. All but the last are in float32.

    python benchmarks/trainer_overhead.py --data bccd.yaml --weights yolov8n_bccd.pt --imgsz 320 --batch 16 --rounds 6
    python benchmarks/trainer_overhead.py --penalty l1        # or group_lasso: sparse training against no hooks
    python benchmarks/trainer_overhead.py --qat               # the placement of `qat`, ranges of 32 images
    python benchmarks/trainer_overhead.py --mixed             # bfloat16 where the CPU has matrix units for it (AMX)

Both take the same images (from memory), augmentations, optimizer, thread count and an optimizer step for every batch. A step
is the time from the start of one batch to the start of the next, so loading and augmentation are in it; the first two steps
of every epoch are dropped. Prints the ratio of medians and of each round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from yolo_compress.data.dataset import Dataset, load
from yolo_compress.prune.penalty import PENALTIES
from yolo_compress.prune.sparsify import SparseTraining
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings
from yolo_compress.train.trainer import HookedTrainer

WARM_STEPS = 2
CALIB_IMAGES = 32


def timed(trainer: Any) -> list[float]:
    """Seconds of each step of one epoch."""
    starts: list[float] = []
    trainer.add_callback("on_train_batch_start", lambda _: starts.append(time.perf_counter()))
    trainer.train()
    steps = [after - before for before, after in itertools.pairwise(starts)]
    return steps[WARM_STEPS:]


def ours(
    dataset: Dataset, settings: TrainSettings, weights: Path, work: Path, hooks: Sequence[TrainHook] = ()
) -> list[float]:
    work.mkdir()
    trainer = HookedTrainer(checkpoint.load_model(weights), dataset, settings, hooks, work, "ours")
    try:
        return timed(trainer)
    finally:
        trainer.close()


def theirs(data: Path, settings: TrainSettings, weights: Path, work: Path, **extra: Any) -> list[float]:
    import torch
    from ultralytics.models.yolo.detect import DetectionTrainer

    overrides = {**settings.overrides(work), "data": str(data), "cache": "ram", "model": str(weights), **extra}
    trainer = DetectionTrainer(overrides=overrides)
    torch.set_num_threads(settings.threads or 2)
    trainer.model = checkpoint.load_model(weights)
    trainer.save_model = lambda: False  # files are no part of a step
    trainer.final_eval = lambda: None
    return timed(trainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    against = parser.add_mutually_exclusive_group()
    against.add_argument(
        "--qat", action="store_true", help="time quantisation-aware training against a plain step of ours"
    )
    against.add_argument("--mixed", action="store_true", help="time mixed precision against a plain step of ours")
    against.add_argument("--penalty", choices=PENALTIES, help="time sparse training against a plain step of ours")
    options = parser.parse_args()
    dataset, weights = load(options.data), find_weights(options.weights)
    settings = TrainSettings(
        epochs=1,
        batch=options.batch,
        imgsz_px=options.imgsz,
        optimizer="AdamW",
        lr0=1e-3,
        threads=options.threads,
        amp=False,  # Ultralytics has none on a CPU
    )
    special = "sparse" if options.penalty else "qat" if options.qat else "mixed" if options.mixed else None
    pair = (special, "plain") if special else ("ours", "ultralytics")
    samples: dict[str, list[list[float]]] = {who: [] for who in pair}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = copy_for_ultralytics(dataset, folder / "data")
        for number in range(options.rounds):
            for who in pair if number % 2 == 0 else pair[::-1]:
                work = folder / f"{who}{number}"
                hooks: list[TrainHook] = []
                if who == "sparse":
                    hooks = [SparseTraining(PENALTIES[options.penalty](), 1e-3)]
                elif who == "qat":
                    images = dataset.train[:CALIB_IMAGES]
                    batches = partial(letterboxed, images, (options.imgsz, options.imgsz))
                    calibrate = partial(ptq, batches=batches, method="max")
                    hooks = [FakeQuant(calibrate, calibrate(checkpoint.load_model(weights)))]
                if who == "ultralytics":
                    samples[who].append(theirs(data, settings, weights, work))
                else:
                    chosen = replace(settings, amp=who == "mixed")
                    samples[who].append(ours(dataset, chosen, weights, work, hooks))
    report(samples, options, len(dataset.train))


def copy_for_ultralytics(dataset: Dataset, folder: Path) -> Path:
    """The same images in a folder where Ultralytics may write its caches."""
    for split, part in (("train", dataset.train), ("val", dataset.val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for sample in part:
            shutil.copy(sample.image, folder / "images" / split / sample.image.name)
            rows = "\n".join(" ".join(map(str, box)) for box in sample.boxes)
            (folder / "labels" / split / f"{sample.image.stem}.txt").write_text(rows + "\n")
    file = folder / "data.yaml"
    names = dict(enumerate(dataset.names))
    file.write_text(yaml.safe_dump({"path": str(folder), "train": "images/train", "val": "images/val", "names": names}))
    return file


def report(samples: dict[str, list[list[float]]], options: argparse.Namespace, images: int) -> None:
    medians = {who: statistics.median(step for steps in runs for step in steps) for who, runs in samples.items()}
    first, second = samples
    rounds = [
        statistics.median(mine) / statistics.median(other)
        for mine, other in zip(samples[first], samples[second], strict=True)
    ]
    count = {who: sum(map(len, runs)) for who, runs in samples.items()}
    print("| trainer | median step ms | n |\n|---|---|---|")
    for who, value in medians.items():
        print(f"| {who} | {1e3 * value:.1f} | {count[who]} |")
    answer = {
        "ratio_of_medians": round(medians[first] / medians[second], 4),
        "ratio_by_round": [round(value, 4) for value in rounds],
        "median_of_rounds": round(statistics.median(rounds), 4),
        "images": images,
        **vars(options),
        "environment": environment.describe(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
