"""What each criterion, scope and reconstruction leave of the mAP once BatchNorm is re-estimated, before any fine-tuning.

    python benchmarks/pruning_criteria.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --keep-flops 0.5

mAP50-95 over the whole validation split, square letterbox, pycocotools. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from yolo_compress.data.dataset import Dataset, calibration_subset, load
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_shapes, parameters
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.reconstruct import reconstruct
from yolo_compress.recipe.choices import CRITERIA
from yolo_compress.recipe.recipe import PruneConfig
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint, losses

SCOPES = get_args(PruneConfig.model_fields["scope"].annotation)


def map50_95(model: nn.Module, dataset: Dataset, args: argparse.Namespace) -> float:
    """Fraction 0 to 1 on the validation split."""
    size = (args.imgsz, args.imgsz)
    with TorchBackend(model, dataset.names, size, args.device) as backend:
        return accuracy(backend, dataset.val, dataset.names, size)["map50_95"]


def measured(
    dense: nn.Module,
    dataset: Dataset,
    importance: dict[str, Tensor],
    evidence: Evidence,
    scope: str,
    rebuilt: bool,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Prune a copy of `dense`, re-estimate, evaluate."""
    size = (args.imgsz, args.imgsz)
    model = copy.deepcopy(dense)
    start = time.perf_counter()
    groups = prunable(model)
    shapes = conv_shapes(model, size)
    budget = keep_flops(shapes, args.keep_flops)
    plan = choose(model, groups, importance, budget, args.round_to, shapes, args.floor, scope)
    if rebuilt:
        reconstruct(model, groups, plan.keep, evidence.moments)
    prune(model, plan.keep)
    seconds = time.perf_counter() - start
    reestimate_batchnorm(model, letterboxed(calibration_subset(dataset.train, args.calib_images, evidence.seed), size))
    return {
        "scope": scope,
        "reconstruct": rebuilt,
        "kept_flops": plan.kept_flops,
        "kept_parameters": parameters(model) / parameters(dense),
        "plan_and_surgery_s": seconds,
        "map50_95": map50_95(model, dataset, args),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320, help="square, px")
    parser.add_argument("--keep-flops", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--floor", type=float, default=0.1)
    parser.add_argument("--calib-images", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=1, help="choices of the calibration images, and of `random`")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=["local", "global"])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    dataset = load(args.data)
    dense = checkpoint.load_model(Path(find_weights(args.weights))).to(args.device)
    described = environment.describe()
    before = map50_95(dense, dataset, args)
    packages = described["packages"]
    print(
        f"{args.weights} on {args.data}, {args.imgsz} px, keep_flops {args.keep_flops}, round_to {args.round_to}, floor "
        f"{args.floor}; {args.calib_images} training images calibrate, n = {len(dataset.val)} validation images; mAP50-95 of "
        f"the dense net {before:.4f}; {args.device} ({described['cpu']}), torch {packages['torch']}, ultralytics "
        f"{packages['ultralytics']}, commit {described['commit']}\n"
    )
    print("| criterion | scope | seed | MACs kept | parameters kept | mAP50-95 | with reconstruction |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    size = (args.imgsz, args.imgsz)
    for seed in range(args.seeds):
        samples = calibration_subset(dataset.train, args.calib_images, seed)
        evidence = Evidence(
            dense,
            prunable(dense),
            images=partial(letterboxed, samples, size),
            losses=partial(losses.losses, dataset=dataset, samples=samples, imgsz_px=args.imgsz),
            seed=seed,
        )
        for criterion in args.criteria:
            importance = scores(evidence, find(criterion))
            for scope in args.scopes:
                plain, rebuilt = (
                    measured(dense, dataset, importance, evidence, scope, rebuilt, args) for rebuilt in (False, True)
                )
                rows += [{"criterion": criterion, "seed": seed, **row} for row in (plain, rebuilt)]
                print(
                    f"| {criterion} | {scope} | {seed} | {plain['kept_flops']:.3f} | {plain['kept_parameters']:.3f} "
                    f"| {plain['map50_95']:.4f} | {rebuilt['map50_95']:.4f} |",
                    flush=True,
                )
    print(json.dumps({"settings": vars(args), "map50_95_dense": before, "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
