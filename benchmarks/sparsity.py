"""What zeros among the weights leave of the mAP before any training, and what they do to latency on CPUs.

    python benchmarks/sparsity.py --weights yolov8n_bccd.pt --data bccd.yaml --imgsz 320

mAP50-95 over the whole validation split, with the weights just masked and after BatchNorm was re-estimated. Latency is FP32, one
process a network, in turn, as a ratio to the dense one. Prints markdown tables, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from pruning_latency import timed
from torch import Tensor, nn

from yolo_compress.data.dataset import calibration_subset, load
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.prune import masks
from yolo_compress.prune.batchnorm import reestimate_batchnorm
from yolo_compress.stages._calibration_images import letterboxed
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="yolov8n_bccd.pt")
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    dataset, size = load(args.data), (args.imgsz, args.imgsz)
    dense = checkpoint.load_model(Path(find_weights(args.weights)))
    kinds: dict[str, dict[str, Tensor]] = {
        f"unstructured {share:.0%} {scope}": masks.unstructured(dense, share, scope)
        for share in (0.5, 0.7, 0.9)
        for scope in ("local", "global")
    }
    kinds["2:4"] = masks.two_four(dense)
    samples = calibration_subset(dataset.train, 96, 0)

    def mean_ap(net: nn.Module) -> float:
        with TorchBackend(net, dataset.names, size) as backend:
            return float(accuracy(backend, dataset.val, dataset.names, size)["map50_95"])

    nets: dict[str, nn.Module] = {"dense": dense}
    rows: dict[str, dict[str, Any]] = {}
    print(f"dense: mAP50-95 {mean_ap(dense):.4f}\n")
    print("| zeros | share of all weights | masked | BatchNorm re-estimated |\n|---|---|---|---|")
    for name, found in kinds.items():
        net = nets[name.replace(" ", "-").replace(":", "-").replace("%", "")] = copy.deepcopy(dense)
        masks.apply(net, found)
        before = mean_ap(net)
        reestimate_batchnorm(net, letterboxed(samples, size))
        rows[name] = {"sparsity": masks.sparsity_of(net), "masked": before, "reestimated": mean_ap(net)}
        print(f"| {name} | {rows[name]['sparsity']:.3f} | {before:.4f} | {rows[name]['reestimated']:.4f} |", flush=True)
    shown = {name: nets[name] for name in ("dense", "2-4", "unstructured-90-global")}
    latencies = timed(shown, dataset.names, args)
    print("\n| network | " + " | ".join(f"{r} ms | ratio" for r in args.runtimes) + " |")
    print("|---|" + "---|---|" * len(args.runtimes))
    for name in shown:
        cells = [f"{latencies[r][name]['p50_ms']:.2f} | {latencies[r][name]['ratio']:.3f}" for r in args.runtimes]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        json.dumps({"settings": vars(args), "rows": rows, "latency": latencies, "environment": environment.describe()})
    )


if __name__ == "__main__":
    main()
