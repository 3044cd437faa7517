"""Depth and width against width alone, at equal MACs: mAP50-95, and latency on each runtime, in turn.

    python benchmarks/depth.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --keep-flops 0.5 0.3
    python benchmarks/depth.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --keep-flops 0.5 0.3 --every
    python benchmarks/depth.py --recipe digits --epochs 20 --keep-flops 0.5
    python benchmarks/depth.py --recipe digits --epochs 20 -- baseline.model=yolov8m.yaml
    python benchmarks/depth.py --recipe neu_det --epochs 20

With `--weights`, nothing is trained: nets are chosen by `obs`, reconstructed, and BatchNorm is re-estimated. `--every` measures each
number of bottlenecks, beside the total error by which `prune.depth` chooses one, and times nothing. With `--recipe`, both nets are
results of `yolo-compress prune`, trained for the same epochs; what is published already is not run again. One process a net, rounds
in turn; ratios are medians over rounds of ratios of medians to the dense net. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from typing import Any

from compared_nets import add_latency, map50_95
from torch import nn

from yolo_compress import load as load_recipe
from yolo_compress import run
from yolo_compress.data.dataset import Dataset, calibration_subset, load
from yolo_compress.errors import RecipeError
from yolo_compress.prune import depth
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import Plan, choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def cut(dense: nn.Module, dataset: Dataset, keep: float, deep: bool, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the pruned net, and its bottlenecks as text. `deep`: bottlenecks may go, too."""
    size = (args.imgsz, args.imgsz)
    samples = calibration_subset(dataset.train, args.images, 0)
    net, shapes = copy.deepcopy(dense), conv_shapes(dense, size)
    limit = keep_flops(shapes, keep)

    def evidence_of(model: nn.Module) -> Evidence:
        return Evidence(model, prunable(model), images=partial(letterboxed, samples, size))

    def widths(model: nn.Module, of: Evidence, left: Any) -> Plan:
        return choose(model, of.groups, scores(of, find("obs")), limit, args.round_to, left, scope="local")

    evidence = evidence_of(net)
    found = depth.chains(net)
    plan = widths(net, evidence, shapes)
    if deep:
        importance = scores(evidence, find("obs"))
        counts = depth.search(
            net, evidence.moments, shapes, limit,
            lambda groups, left: choose(net, groups, importance, limit, args.round_to, left, scope="local"), True,
        )  # fmt: skip
        shallow = copy.deepcopy(net)
        depth.shorten(shallow, counts, evidence.moments)
        left = depth.remaining_shapes(shapes, found, counts)
        moments = depth.remaining_moments(evidence.moments, found, counts)  # as the stage does
        own = widths(shallow, Evidence(shallow, prunable(shallow), moments=moments), left)
        plan = depth.with_bottlenecks(own, evidence.groups, shapes, found, counts)
    depth.remove(net, plan, evidence.moments)
    reestimate_batchnorm(net, letterboxed(samples, size))
    before = sum(len(chain.bottlenecks) for chain in found.values())
    return net, f"{sum(len(chain.bottlenecks) for chain in depth.chains(net).values())} of {before}"


def every(dense: nn.Module, dataset: Dataset, keep: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return total error and mAP50-95 as cut for each number of removed bottlenecks, in the order of `prune.depth`."""
    size = (args.imgsz, args.imgsz)
    samples = calibration_subset(dataset.train, args.images, 0)
    shapes, found = conv_shapes(dense, size), depth.chains(dense)
    limit = keep_flops(shapes, keep)
    evidence = Evidence(dense, prunable(dense), images=partial(letterboxed, samples, size))
    errors = depth._Errors(dense, evidence.moments, refitted=True)
    steps = depth._order(found, shapes, limit, errors)
    rows: list[dict[str, Any]] = []
    for number in range(len(steps) + 1):
        counts = {layer: len(chain.bottlenecks) - steps[:number].count(layer) for layer, chain in found.items()}
        shallow, net = copy.deepcopy(dense), copy.deepcopy(dense)
        depth.shorten(shallow, counts, evidence.moments)
        moments = depth.remaining_moments(evidence.moments, found, counts)
        own = Evidence(shallow, prunable(shallow), moments=moments)
        left = depth.remaining_shapes(shapes, found, counts)
        try:
            plan = choose(shallow, own.groups, scores(own, find("obs")), limit, args.round_to, left, scope="local")
        except RecipeError:
            continue  # the budget cannot be met with these bottlenecks
        total = errors.total(found, counts, own.groups, plan)
        depth.remove(net, depth.with_bottlenecks(plan, evidence.groups, shapes, found, counts), evidence.moments)
        reestimate_batchnorm(net, letterboxed(samples, size))
        rows.append({"keep": keep, "removed": number, "layers": steps[:number], "error": total,
                     "map50_95": map50_95(net, dataset, size, args.val_images)})  # fmt: skip
        print(f"| {keep:g} | {number} of {len(steps)} | {total:.3f} | {rows[-1]['map50_95']:.3f} |", flush=True)
    return rows


def trained(recipe: str, keep: float, deep: bool, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the net of `yolo-compress prune`, and its bottlenecks as text."""
    own = [("prune.keep_flops", f"{keep:g}"), ("prune.epochs", str(args.epochs)), ("prune.depth", str(deep).lower()),
           ("prune.round_to", str(args.round_to)), ("run.seed", str(args.seed))]  # fmt: skip
    net = checkpoint.load_model(run(load_recipe(recipe, [*args.overrides, *own]), "prune").file("model.pt"))
    return net, f"{sum(len(chain.bottlenecks) for chain in depth.chains(net).values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--keep-flops", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--images", type=int, default=96, help="calibration images")
    parser.add_argument("--val-images", type=int, help="validation images; default: all")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--every", action="store_true", help="each number of bottlenecks, without latency")
    parser.add_argument("--recipe", help="train with this recipe instead of cutting --weights")
    parser.add_argument("--epochs", type=int, default=20, help="of `prune`, with --recipe")
    parser.add_argument("--seed", type=int, default=0, help="with --recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value, with --recipe; give them after --")
    args = parser.parse_args()
    if args.overrides and not args.recipe:
        parser.error("section.key=value has no effect without --recipe")
    if args.every and args.recipe:
        parser.error("--every cuts --weights and trains nothing: leave --recipe out")
    args.overrides = [(key, value) for key, _, value in (text.partition("=") for text in args.overrides)]
    if args.recipe:
        chosen = load_recipe(args.recipe, args.overrides)
        size, dataset = chosen.data.imgsz_hw, load(chosen.data.yaml)
        dense = checkpoint.load_model(run(chosen, "baseline").file("model.pt"))
    else:
        size, dataset = (args.imgsz, args.imgsz), load(args.data)
        dense = checkpoint.load_model(find_weights(args.weights))
    if args.every:
        print("| MACs | removed | total error | mAP50-95 as cut |\n|---|---|---|---|")
        found = [row for keep in args.keep_flops for row in every(dense, dataset, keep, args)]
        print(json.dumps({"settings": vars(args), "rows": found, "environment": environment.describe()}))
        return
    nets: dict[str, tuple[nn.Module, str]] = {"dense": (dense, "all")}
    for keep in args.keep_flops:
        for name, deep in (("width", False), ("depth and width", True)):
            made = trained(args.recipe, keep, deep, args) if args.recipe else cut(dense, dataset, keep, deep, args)
            nets[f"{keep:g}, {name}"] = made
    rows: list[dict[str, Any]] = []
    for name, (net, bottlenecks) in nets.items():
        macs, score = conv_macs(net, size) / conv_macs(dense, size), map50_95(net, dataset, size, args.val_images)
        rows.append({"net": name, "bottlenecks": bottlenecks, "macs": macs, "map50_95": score})
    add_latency(rows, [net for net, _ in nets.values()], dataset.names, size, args)
    described = environment.describe()
    what = f"recipe {args.recipe}, {args.epochs} epochs" if args.recipe else args.weights
    print(
        f"{what}, {size[0]}x{size[1]} px, n = {args.rounds} rounds of {args.samples}; {described['cpu']}, {device_state()}\n"
    )
    print(
        f"| net | bottlenecks | MACs | mAP50-95 {'trained' if args.recipe else 'as cut'} | {' | '.join(args.runtimes)} |"
    )
    print("|---" * (4 + len(args.runtimes)) + "|")
    for row in rows:
        ratios = " | ".join(f"{row[runtime]:.3f}" for runtime in args.runtimes)
        print(f"| {row['net']} | {row['bottlenecks']} | {row['macs']:.3f} | {row['map50_95']:.3f} | {ratios} |")
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
