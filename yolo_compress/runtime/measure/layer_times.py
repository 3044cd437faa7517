"""Time each layer of a model on this machine at several widths. `prune.latency_ms` plans with the table.

    python3 -m yolo_compress.runtime.measure.layer_times FOLDER --runtime onnxruntime > table.json

FOLDER is the output of `yolo-compress probe`: ONNX files of the model at several widths, and `layers.json`, which maps nodes to
convolutions and has their MACs at each width. Only numpy and one engine library are needed. `qat.sensitivity_price` writes the
same kind of folder for one model in FP32 and INT8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence, TypedDict

import numpy as np

from .. import json_text
from ..backends.base import PRECISIONS
from ..commands.command_line import Parser, answer, run_command
from ..engine import BACKENDS, open_engine
from ..errors import EngineError
from ..registry import names
from .device import DeviceState, device_state
from .latency import measure

SCHEMA = 1
LAYERS = "layers.json"
PROFILED_RUNS = 40
TIMED_RUNS = 100
ROUNDS = 3  # the models take turns, so that drift affects all of them equally


class _Macs(TypedDict):
    file: str  # ONNX file, in the folder of `layers.json`
    macs: Dict[str, float]  # convolution -> MACs of one image


class Network(_Macs, total=False):
    """One model (an ONNX file) in `layers.json`, with the MACs of its convolutions."""

    precision: str  # precision of the timed engine; default: the one on the command line


class _Probe(TypedDict):
    networks: List[Network]  # the first one has full width
    nodes: Dict[str, str]  # convolution -> common part of the node names of the convolution and its activation
    imgsz: List[int]  # [height, width] of the input, px


class Probe(_Probe, total=False):
    """Content of `layers.json`: the models in a folder of `yolo-compress probe`, and how to find their convolutions in an engine."""

    convs: Dict[str, str]  # convolution -> its ONNX node; the engine must not fuse it with another convolution


class LayerTable(TypedDict):
    """The latency table: time of each convolution as a curve. A curve is a list of [MACs, ms] with one point per model."""

    schema: int
    runtime: str
    precision: str
    imgsz: List[int]  # [height, width] of the input, px
    threads: Optional[int]  # threads of one inference on a CPU; null: one per usable processor
    device: DeviceState
    whole_ms: float  # latency of the first model
    layers: Dict[str, List[List[float]]]  # convolution -> its curve, activation included
    rest: List[List[float]]  # curve of all other nodes, over the square root of the model's MACs


def take(folder: Path, runtime: str, precision: str, threads: Optional[int] = None) -> LayerTable:
    """Return the latency table: build an engine of each model in `folder`, and measure its latency and the times of its layers.

    Raises:
        EngineError: `layers.json` is missing or malformed, or the library rejects a model. Or the library fuses two convolutions of
            `layers.json` into one node.
        RuntimeUnavailable: the library is missing.
    """
    described = _read_probe(folder)
    layers: Dict[str, List[List[float]]] = {name: [] for name in described["nodes"]}
    rest: List[List[float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        engines = []
        for network in described["networks"]:
            out = Path(scratch) / Path(network["file"]).stem
            BACKENDS[runtime].build(folder / network["file"], out, network.get("precision", precision))
            engines.append(out)
        whole = _whole_ms(engines[0], threads)
        times = _in_turn(engines, threads)
    for network, nodes in zip(described["networks"], times):
        _require_own_node(nodes, described.get("convs", {}), "{} of {}".format(network["file"], runtime))
        own = _by_layer(nodes, described["nodes"])
        for name, macs in network["macs"].items():
            layers[name].append([float(macs), own.pop(name, 0.0)])
        rest.append([float(np.sqrt(sum(network["macs"].values()))), own[""]])
    return {
        "schema": SCHEMA,
        "runtime": runtime,
        "precision": precision,
        "imgsz": described["imgsz"],
        "threads": threads,
        "device": device_state(),
        "whole_ms": whole,
        "layers": layers,
        "rest": rest,
    }


def _whole_ms(engine: Path, threads: Optional[int]) -> float:
    """Return the latency of an engine in ms: the lowest median after opening the engine a few times.

    Other processes and badly placed threads can only make an engine slower.
    """
    medians = []
    for _ in range(ROUNDS):
        with open_engine(engine, threads=threads) as backend:
            shape = (backend.batch or 1, backend.channels) + tuple(backend.imgsz)
            images = np.random.default_rng(0).random(shape, dtype=np.float32)
            medians.append(float(np.median(measure(backend.bind(images), TIMED_RUNS))))
    return min(medians)


def _in_turn(engines: Sequence[Path], threads: Optional[int]) -> List[Dict[str, float]]:
    """Measure engines alternately. Return a dict from node name to ms for each engine: the minimum over the rounds."""
    rounds: List[List[Dict[str, float]]] = [[] for _ in engines]
    for _ in range(ROUNDS):
        for index, engine in enumerate(engines):
            with open_engine(engine, threads=threads) as backend:
                rounds[index].append(backend.node_ms(PROFILED_RUNS))
    return [
        {name: min(times[name] for times in of_engine if name in times) for name in of_engine[0]}
        for of_engine in rounds
    ]


def _read_probe(folder: Path) -> Probe:
    """Read and check `layers.json`.

    Raises:
        EngineError: `layers.json` is missing or malformed.
    """
    try:
        found: Probe = json_text.read(folder / LAYERS)
        networks, nodes, imgsz = found["networks"], found["nodes"], found["imgsz"]
        texts = [*nodes.values(), *found.get("convs", {}).values(), *(one["file"] for one in networks)]
        numbers = [*imgsz, *(macs for one in networks for macs in one["macs"].values())]
        sound = (
            len(imgsz) == 2
            and len(networks) > 0
            and all(isinstance(text, str) for text in texts)
            and all(type(number) in (int, float) and number >= 0 for number in numbers)
            and all(one["macs"].keys() <= nodes.keys() for one in networks)
            and all(one.get("precision", PRECISIONS[0]) in PRECISIONS for one in networks)
        )
        if not sound:
            raise ValueError("malformed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{folder}: no readable {LAYERS} ({error}); write it with yolo-compress probe") from error
    return found


def _by_layer(nodes_ms: Dict[str, float], convs: Dict[str, str]) -> Dict[str, float]:
    """Return convolution -> sum of the times of its nodes. The key "" has the sum over all other nodes.

    The library's name of a node contains the ONNX names of the nodes that it fused.
    """
    totals: Dict[str, float] = {"": 0.0}
    places = sorted(convs.items(), key=lambda item: -len(item[1]))  # /a/conv10 before /a/conv1
    for node, ms in nodes_ms.items():
        owner = next((conv for conv, place in places if place in node), "")
        totals[owner] = totals.get(owner, 0.0) + ms
    return totals


def _require_own_node(nodes_ms: Dict[str, float], convs: Dict[str, str], where: str) -> None:
    """Check that every convolution has its own node in the engine. A node of two convolutions would not give the time of each.

    Raises:
        EngineError: a convolution has no node of its own. The message lists the nodes that the convolution shares.
    """
    named = {node: [conv for conv, name in convs.items() if name in node] for node in nodes_ms}
    for conv, name in convs.items():
        if [conv] not in named.values():
            shared = [node for node, held in named.items() if conv in held]
            raise EngineError(
                f"{where}: none of {len(nodes_ms)} timed nodes is {conv} ({name}) alone, "
                + (f"it is fused into {', '.join(shared)}" if shared else "and none names it")
                + "; its latency is not known, only its GFLOPs"
            )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table as one JSON document."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=sorted(names(times_layers=True)), required=True)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    return run_command(
        lambda: answer(json.dumps(take(options.folder, options.runtime, options.precision, options.threads)))
    )


if __name__ == "__main__":
    sys.exit(main())
