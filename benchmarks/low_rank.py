"""Low rank against channel pruning at equal MACs and epochs: mAP50-95, and latency on each runtime, in turn.

    python benchmarks/low_rank.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --keep-flops 0.7 0.5
    python benchmarks/low_rank.py --recipe bccd --epochs 40 --keep-flops 0.5 --seeds 0 1 2
    python benchmarks/low_rank.py --recipe bccd --epochs 40 --keep-flops 0.5 -- baseline.pretrained=yolov8s.pt data.imgsz=640

With `--weights`, nothing is trained: models are cut, refitted, and BatchNorm is re-estimated. With `--recipe`, they are results of
`yolo-compress prune`, trained for the same epochs; what is published already is not run again. Sizes n, s, m at 320 and 640 px are
one call each. One process a model, rounds in turn; ratios are medians over rounds of ratios of medians to the dense model. With
several seeds, mAP is the mean over seeds and latency is that of the first. Prints a markdown table, then for each budget whether low
rank is ahead (as fast within 2 %, and more mAP; or as much mAP within 0.003, and faster), and on the last line JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from functools import partial
from typing import Any

from compared_nets import add_latency, map50_95
from torch import nn

from yolo_compress import load as load_recipe
from yolo_compress import run
from yolo_compress.data.dataset import Dataset, calibration_subset, load
from yolo_compress.nets.factors import is_factorised
from yolo_compress.prune import depth
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable
from yolo_compress.prune.low_rank import LowRank
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint

WAYS: dict[str, list[tuple[str, str]]] = {
    "channels": [],
    "low rank": [("prune.kind", "low_rank")],
    "channels, then low rank": [("prune.then", "low_rank")],
}
FASTER, SAME_MAP = 0.02, 0.003


def cut(dense: nn.Module, dataset: Dataset, keep: float, way: str, args: argparse.Namespace) -> nn.Module:
    """Return the model with a share `keep` of the MACs, without training."""
    size, net = (args.imgsz, args.imgsz), copy.deepcopy(dense)
    images = partial(letterboxed, calibration_subset(dataset.train, args.images, 0), size)
    shapes = conv_shapes(net, size)
    target = keep_flops(shapes, keep)
    if way != "low rank":
        first = keep if way == "channels" else keep ** (1 - args.then_share)
        evidence = Evidence(net, prunable(net), images=images)
        importance = scores(evidence, find("obs"))
        limit = keep_flops(shapes, first)
        depth.remove(
            net, choose(net, evidence.groups, importance, limit, args.round_to, shapes, scope="local"), evidence.moments
        )
        reestimate_batchnorm(net, images())
    if way != "channels":
        low_rank = LowRank(net, conv_shapes(net, size), size, args.round_to, 0.1, images)
        low_rank.apply(net, low_rank.plan(target), reconstruct=True)
        reestimate_batchnorm(net, images())
    return net


def trained(recipe: str, keep: float, way: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return the model of `yolo-compress prune`."""
    own = [("prune.keep_flops", f"{keep:g}"), ("prune.epochs", str(args.epochs)), ("run.seed", str(seed)),
           ("prune.round_to", str(args.round_to)), *WAYS[way]]  # fmt: skip
    if way == "channels, then low rank":
        own.append(("prune.then_share", f"{args.then_share:g}"))
    return checkpoint.load_model(run(load_recipe(recipe, [*args.overrides, *own]), "prune").file("model.pt"))


def verdicts(rows: list[dict[str, Any]], runtimes: list[str]) -> list[str]:
    """Return a line for each budget, runtime and way of low rank: whether it is ahead of channel pruning."""
    lines = []
    for rival in (row for row in rows if row["way"] == "channels"):
        for row in rows:
            if row["keep"] != rival["keep"] or row["way"] in ("channels", "dense"):
                continue
            for runtime in runtimes:
                time, gain = row[runtime] / rival[runtime] - 1, row["map50_95"] - rival["map50_95"]
                ahead = (time <= FASTER and gain > SAME_MAP) or (time < -FASTER and gain >= -SAME_MAP)
                lines.append(
                    f"{row['keep']:g}, {runtime}: {row['way']} is {'' if ahead else 'not '}ahead: {time:+.1%} time, "
                    f"{gain:+.3f} mAP50-95 against channels"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320, help="with --weights")
    parser.add_argument("--keep-flops", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--then-share", type=float, default=0.3)
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--images", type=int, default=96, help="calibration images")
    parser.add_argument("--val-images", type=int, help="validation images; default: all")
    parser.add_argument("--runtimes", nargs="*", default=["onnxruntime", "openvino"], help="none: nothing is timed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--recipe", help="train with this recipe instead of cutting --weights")
    parser.add_argument("--epochs", type=int, default=40, help="of `prune`, with --recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="with --recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value, with --recipe; give them after --")
    args = parser.parse_args()
    if args.overrides and not args.recipe:
        parser.error("section.key=value has no effect without --recipe")
    args.overrides = [(key, value) for key, _, value in (text.partition("=") for text in args.overrides)]
    if args.recipe:
        chosen = load_recipe(args.recipe, args.overrides)
        size, dataset = chosen.data.imgsz_hw, load(chosen.data.yaml)
        dense = checkpoint.load_model(run(chosen, "baseline").file("model.pt"))
    else:
        size, dataset = (args.imgsz, args.imgsz), load(args.data)
        dense = checkpoint.load_model(find_weights(args.weights))
    nets, rows = [dense], [{"keep": 1.0, "way": "dense", "maps": [map50_95(dense, dataset, size, args.val_images)]}]
    for keep in args.keep_flops:
        for way in WAYS:
            made = (
                [trained(args.recipe, keep, way, seed, args) for seed in args.seeds]
                if args.recipe
                else [cut(dense, dataset, keep, way, args)]
            )
            nets.append(made[0])
            rows.append(
                {"keep": keep, "way": way, "maps": [map50_95(net, dataset, size, args.val_images) for net in made]}
            )
    for row, net in zip(rows, nets, strict=True):
        row["map50_95"] = statistics.fmean(row["maps"])
        row["macs"] = conv_macs(net, size) / conv_macs(dense, size)
        row["factorised"] = sum(is_factorised(module) for module in net.modules())
    if args.runtimes:
        add_latency(rows, nets, dataset.names, size, args)
    described = environment.describe()
    what = (
        f"recipe {args.recipe}, {args.epochs} epochs, seeds {args.seeds}" if args.recipe else f"{args.weights}, as cut"
    )
    print(
        f"{what}, {size[0]}x{size[1]} px, n = {args.rounds} rounds of {args.samples}; {described['cpu']}, {device_state()}\n"
    )
    print(f"| MACs | way | factorised | mAP50-95 | {' | '.join(args.runtimes)} |")
    print("|---" * (4 + len(args.runtimes)) + "|")
    for row in rows:
        ratios = " | ".join(f"{row[runtime]:.3f}" for runtime in args.runtimes)
        print(f"| {row['macs']:.3f} | {row['way']} | {row['factorised']} | {row['map50_95']:.3f} | {ratios} |")
    print()
    if args.runtimes:
        print("\n".join(verdicts(rows, args.runtimes)))
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
