"""The row that decides whether pruning was worth it: a narrower YOLOv8 of the same MACs, from the same COCO weights.

    python benchmarks/narrow.py --recipe bccd --coco yolov8n_coco.pt --keep-flops 0.5
    python benchmarks/narrow.py --recipe bccd --keep-flops 0.25 --lr0 0.002 --taught --weights 8 6 2

Every width is scaled alike and takes the leading channels of the COCO checkpoint, as far as they fit; then it is trained on the
recipe's data with the schedule, epochs and budget of the recipe's section `prune`, as any detector is, without a teacher; or
`--taught` by the recipe's baseline, as `prune` and `qat` teach, or with other `--weights`. `--lr0` tries a rate for nets that
have not seen the data. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from uniform import uniform

from yolo_compress import load
from yolo_compress.data.dataset import calibration_subset
from yolo_compress.data.dataset import load as load_data
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes, parameters
from yolo_compress.prune.criteria import scores
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.recipe.recipe import TrainConfig
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.stages._training import PARENT_BOX_WEIGHT, PARENT_CLASS_WEIGHT, PARENT_FEATURE_WEIGHT
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.settings import TrainSettings

CALIB_IMAGES = 96


@torch.no_grad()
def take_what_fits(model: nn.Module, source: nn.Module) -> None:
    """Copy the leading block of every tensor of the same name."""
    have = source.state_dict()
    for name, tensor in model.state_dict().items():
        if name in have and have[name].dim() == tensor.dim():
            block = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, have[name].shape, strict=True))
            tensor[block] = have[name][block]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bccd")
    parser.add_argument("--coco", default="yolov8n_coco.pt")
    parser.add_argument("--keep-flops", type=float, default=0.5, help="of the recipe's baseline")
    parser.add_argument("--epochs", type=int, help="default: the recipe's prune.epochs")
    parser.add_argument("--lr0", type=float, help="default: the recipe's prune.lr0")
    parser.add_argument("--taught", action="store_true", help="by the recipe's baseline")
    parser.add_argument(
        "--weights",
        type=float,
        nargs=3,
        metavar=("CLASS", "BOX", "FEATURE"),
        help="of the teacher's terms; default: as in `prune`",
    )
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.weights and not args.taught:
        parser.error("--weights without --taught: there is no teacher to weigh")
    recipe = load(args.recipe)
    assert recipe.prune and recipe.baseline.weights, "a recipe with a section prune and given baseline.weights"
    size = recipe.data.imgsz_hw
    dataset = load_data(recipe.data.yaml)
    dense_macs = conv_macs(checkpoint.load_model(find_weights(recipe.baseline.weights)), size)
    model = checkpoint.new_model("yolov8n.yaml", dataset.names, dataset.channels, args.seed)
    take_what_fits(model, checkpoint.load_model(find_weights(args.coco)))
    samples = calibration_subset(dataset.train, CALIB_IMAGES, args.seed)

    groups = prunable(model)
    shapes = conv_shapes(model, size)
    budget = keep_flops(shapes, args.keep_flops * dense_macs / conv_macs(model, size))
    importance = scores(Evidence(model, groups, seed=args.seed), uniform)
    plan = choose(model, groups, importance, budget, recipe.prune.round_to, shapes, recipe.prune.floor, "local")
    prune(model, plan.keep)
    reestimate_batchnorm(model, letterboxed(samples, size))

    schedule = {name: getattr(recipe.prune, name) for name in TrainConfig.model_fields}
    schedule |= {"epochs": args.epochs or recipe.prune.epochs, "lr0": args.lr0 or recipe.prune.lr0}
    machine = recipe.run
    settings = TrainSettings(
        **schedule,
        imgsz_px=max(size),
        seed=args.seed,
        device=machine.device,
        workers=machine.workers,
        threads=args.threads or machine.threads,
    )
    hooks = []
    if args.taught:
        weights = args.weights or (PARENT_CLASS_WEIGHT, PARENT_BOX_WEIGHT, PARENT_FEATURE_WEIGHT)
        terms = dict(zip(("class_weight", "box_weight", "feature_weight"), weights, strict=True))
        hooks = [Teach(Frozen(checkpoint.load_model(find_weights(recipe.baseline.weights))), **terms)]
    with tempfile.TemporaryDirectory() as work:
        trained = trainer.train(model, dataset, settings, hooks, Path(work), "narrow")
    with TorchBackend(trained, dataset.names, size) as backend:
        result = accuracy(backend, dataset.val, dataset.names, size)
    print(
        json.dumps(
            {
                "settings": vars(args),
                "kept_flops": conv_macs(trained, size) / dense_macs,
                "parameters": parameters(trained),
                "map50_95": result["map50_95"],
                "images": len(dataset.val),
                "environment": environment.describe(),
            }
        )
    )


if __name__ == "__main__":
    main()
