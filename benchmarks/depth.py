"""Depth and width against width alone, at equal MACs: mAP right after the cut, and latency on each runtime, in turn.

    python benchmarks/depth.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --keep-flops 0.5 0.3

Both nets are chosen by `obs`, reconstructed, and BatchNorm is re-estimated; nothing is trained. For a training run
`yolo-compress prune recipe=NAME prune.depth=true` and `prune.depth=false`. One process a net, rounds in turn; ratios are medians over
rounds of ratios of medians to the dense net. Prints a markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from yolo_compress.data.dataset import Dataset, calibration_subset, load
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.prune import depth
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import Plan, choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
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
        return choose(model, of.groups, scores(of, find("obs")), limit, args.round_to, left)

    evidence = evidence_of(net)
    found = depth.chains(net)
    plan = widths(net, evidence, shapes)
    if deep:
        importance = scores(evidence, find("obs"))
        counts = depth.search(
            net, evidence.moments, shapes, limit,
            lambda groups, left: choose(net, groups, importance, limit, args.round_to, left), True,
        )  # fmt: skip
        shallow = copy.deepcopy(net)
        depth.shorten(shallow, counts, evidence.moments)
        left = depth.remaining_shapes(shapes, found, counts)
        own = widths(shallow, evidence_of(shallow), left)
        plan = depth.with_bottlenecks(own, evidence.groups, shapes, found, counts)
    depth.remove(net, plan, evidence.moments)
    reestimate_batchnorm(net, letterboxed(samples, size))
    before = sum(len(chain.bottlenecks) for chain in found.values())
    return net, f"{sum(len(chain.bottlenecks) for chain in depth.chains(net).values())} of {before}"


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
    args = parser.parse_args()
    size, dataset = (args.imgsz, args.imgsz), load(args.data)
    dense = checkpoint.load_model(find_weights(args.weights))
    nets: dict[str, tuple[nn.Module, str]] = {"dense": (dense, "all")}
    for keep in args.keep_flops:
        nets[f"{keep:g}, width"] = cut(dense, dataset, keep, False, args)
        nets[f"{keep:g}, depth and width"] = cut(dense, dataset, keep, True, args)
    rows: list[dict[str, Any]] = []
    val = dataset.val[: args.val_images]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (net, bottlenecks)) in enumerate(nets.items()):
            with TorchBackend(net, dataset.names, size) as backend:
                found = accuracy(backend, val, dataset.names, size)
            macs = conv_macs(net, size) / conv_macs(dense, size)
            rows.append({"net": name, "bottlenecks": bottlenecks, "macs": macs, "map50_95": found["map50_95"]})
            export_onnx(net, Path(scratch, f"{number}.onnx"), size, names=dataset.names)
        for runtime in args.runtimes:
            engines = [Path(scratch, runtime, str(number)) for number in range(len(nets))]
            for number, engine in enumerate(engines):
                BACKENDS[runtime].build(Path(scratch, f"{number}.onnx"), engine, "fp32")
            specs = [{"label": e.name, "engine": str(e), "threads": args.threads} for e in engines]
            taken = [one["rounds_ms"] for one in measure_in_turn(specs, args.rounds, args.samples)]
            medians = np.array([[np.median(one) for one in each] for each in taken])
            for row, ratio in zip(rows, np.median(medians / medians[0], axis=1), strict=True):
                row[runtime] = float(ratio)
    described = environment.describe()
    print(
        f"{args.weights}, {args.imgsz} px, n = {args.rounds} rounds of {args.samples}; {described['cpu']}, {device_state()}\n"
    )
    print(f"| net | bottlenecks | MACs | mAP50-95 as cut | {' | '.join(args.runtimes)} |")
    print("|---" * (4 + len(args.runtimes)) + "|")
    for row in rows:
        ratios = " | ".join(f"{row[runtime]:.3f}" for runtime in args.runtimes)
        print(f"| {row['net']} | {row['bottlenecks']} | {row['macs']:.3f} | {row['map50_95']:.3f} | {ratios} |")
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    main()
