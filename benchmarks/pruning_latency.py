"""What pruning does to latency: pruned at several roundings, uniformly narrowed and dense, on each runtime, in turn.

    python benchmarks/pruning_latency.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320 --keep-flops 0.5

One process a network, rounds in turn; ratios are medians over rounds of ratios of medians to the dense network. mAP50-95 is
that of the pruned network without any training (the importance, hand-over and BatchNorm of `prune`). `narrower` is stock YOLOv8
with the `width_multiple` that comes nearest to the same MACs, weights random. Prints a markdown table, and on the last line JSON.
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
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.prune.budget import choose, keep_flops
from yolo_compress.prune.calibration_stats import Evidence
from yolo_compress.prune.cost import conv_macs, conv_shapes
from yolo_compress.prune.criteria import find, scores
from yolo_compress.prune.graph import prunable, prune
from yolo_compress.prune.reconstruct import reconstruct
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def narrower(dense: nn.Module, keep: float, imgsz_hw: tuple[int, int]) -> nn.Module:
    """Stock YOLOv8 of the depth of n, and of the width whose MACs are nearest to `keep` of those of `dense`."""
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load  # after ours, which hardens its environment

    described = yaml_model_load("yolov8n.yaml")
    depth, full, most = described["scales"]["n"]
    target = keep * conv_macs(dense, imgsz_hw)
    nets = []
    for percent in range(40, 100, 2):
        scales = {"n": [depth, full * percent / 100, most]}
        nets.append(DetectionModel({**described, "scales": scales}, nc=dense.model[-1].nc, verbose=False).eval())
    return min(nets, key=lambda net: abs(conv_macs(net, imgsz_hw) - target))


def pruned(dense: nn.Module, dataset: Dataset, scope: str, round_to: int, args: argparse.Namespace) -> nn.Module:
    size = (args.imgsz, args.imgsz)
    samples = calibration_subset(dataset.train, 96, 0)
    net = copy.deepcopy(dense)
    groups = prunable(net)
    evidence = Evidence(net, groups, images=partial(letterboxed, samples, size))
    shapes = conv_shapes(net, size)
    limit = keep_flops(shapes, args.keep_flops)
    plan = choose(net, groups, scores(evidence, find("obs")), limit, round_to, shapes, scope=scope)
    reconstruct(net, groups, plan.keep, evidence.moments)
    prune(net, plan.keep)
    reestimate_batchnorm(net, letterboxed(samples, size))
    return net


def timed(nets: dict[str, nn.Module], names: tuple[str, ...], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each runtime and network: median ms and the ratio to `dense`."""
    size = (args.imgsz, args.imgsz)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, net in nets.items():
            export_onnx(net, folder / f"{name}.onnx", size, names=names)
        for runtime in args.runtimes:
            specs = []
            for name in nets:
                engine = folder / runtime / name
                BACKENDS[runtime].build(folder / f"{name}.onnx", engine, "fp32")
                specs.append({"label": name, "engine": str(engine), "threads": args.threads})
            rounds = [r["rounds_ms"] for r in measure_in_turn(specs, args.rounds, args.samples)]
            medians = np.array([[np.median(one) for one in taken] for taken in rounds])  # network x round
            ratios = np.median(medians / medians[0], axis=1)
            results[runtime] = {
                name: {"p50_ms": float(np.median(medians[i])), "ratio": float(ratios[i])} for i, name in enumerate(nets)
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--keep-flops", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--scopes", nargs="+", default=["local"])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    size = (args.imgsz, args.imgsz)
    dataset = load(args.data)
    dense = checkpoint.load_model(Path(find_weights(args.weights)))
    nets = {"dense": dense, "narrower": narrower(dense, args.keep_flops, size)}
    for scope in args.scopes:
        for round_to in args.round_to:
            nets[f"{scope}-{round_to}"] = pruned(dense, dataset, scope, round_to, args)
    accuracies: dict[str, float | None] = {}
    for name, net in nets.items():
        with TorchBackend(net, dataset.names, size) as backend:
            scored = None if name == "narrower" else accuracy(backend, dataset.val, dataset.names, size)["map50_95"]
            accuracies[name] = scored
    latencies = timed(nets, dataset.names, args)
    described = environment.describe()
    print(
        f"{args.weights}, {args.imgsz} px, keep_flops {args.keep_flops}; n = {args.rounds} rounds of {args.samples}; "
        f"{described['cpu']}, {described['cores']} cores, {device_state()}, commit {described['commit']}\n"
    )
    print(
        "| network | MACs kept | mAP50-95, untrained | " + " | ".join(f"{r} ms | ratio" for r in args.runtimes) + " |"
    )
    print("|---|---|---|" + "---|---|" * len(args.runtimes))
    kept = {name: conv_macs(net, size) / conv_macs(dense, size) for name, net in nets.items()}
    for name in nets:
        cells = [f"{latencies[r][name]['p50_ms']:.2f} | {latencies[r][name]['ratio']:.3f}" for r in args.runtimes]
        score = accuracies[name]
        print(f"| {name} | {kept[name]:.3f} | {'' if score is None else f'{score:.4f}'} | " + " | ".join(cells) + " |")
    print(json.dumps({"settings": vars(args), "kept_flops": kept, "map50_95": accuracies, "latency": latencies,
                      "environment": described}))  # fmt: skip


if __name__ == "__main__":
    main()
