"""mAP and latency of nets that a benchmark compares. Not a command."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from yolo_compress.data.dataset import Dataset
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.runtime.engine import BACKENDS
from yolo_compress.runtime.measure.interleaved import measure_in_turn


def map50_95(net: nn.Module, dataset: Dataset, size: tuple[int, int], images: int | None) -> float:
    """Return mAP50-95 in torch on the first `images` validation images; None: on all."""
    with TorchBackend(net, dataset.names, size) as backend:
        return float(accuracy(backend, dataset.val[:images], dataset.names, size)["map50_95"])


def add_latency(
    rows: list[dict[str, Any]],
    nets: Sequence[nn.Module],
    names: Sequence[str],
    size: tuple[int, int],
    options: argparse.Namespace,
) -> None:
    """Add to the row of each net its FP32 latency on each runtime, relative to that of the first net.

    It is the median over rounds of the ratios of medians. One process a net, rounds in turn.

    Args:
        options: has `runtimes`, `threads`, `rounds` and `samples` (calls a round).
    """
    with tempfile.TemporaryDirectory() as scratch:
        for number, net in enumerate(nets):
            export_onnx(net, Path(scratch, f"{number}.onnx"), size, names=names)
        for runtime in options.runtimes:
            engines = [Path(scratch, runtime, str(number)) for number in range(len(nets))]
            for number, engine in enumerate(engines):
                BACKENDS[runtime].build(Path(scratch, f"{number}.onnx"), engine, "fp32")
            specs = [{"label": e.name, "engine": str(e), "threads": options.threads} for e in engines]
            taken = [one["rounds_ms"] for one in measure_in_turn(specs, options.rounds, options.samples)]
            medians = np.array([[np.median(one) for one in each] for each in taken])
            for row, ratio in zip(rows, np.median(medians / medians[0], axis=1), strict=True):
                row[runtime] = float(ratio)
