"""What each layer of a network costs on this machine at several widths: the table that `prune.latency_ms` plans with.

    python3 -m yolo_compress.runtime.measure.layer_times FOLDER --runtime onnxruntime > table.json

FOLDER is what `yolo-compress probe` wrote: the network at several widths as ONNX, and `layers.json`, which says which node
belongs to which convolution and how many MACs it has at each width. Needs numpy and one engine library. `qat.sensitivity_price`
writes the same of one network in FP32 and in INT8.
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
from ..commands.common import Parser, answer, guarded
from ..engine import BACKENDS, open_engine
from ..errors import EngineError
from .device import DeviceState, device_state
from .latency import measure

SCHEMA = 1
LAYERS = "layers.json"
PROFILED_RUNS = 40
TIMED_RUNS = 100
ROUNDS = 3  # the networks take turns, so that drift meets all of them alike


class _Macs(TypedDict):
    file: str  # ONNX, in the folder of `layers.json`
    macs: Dict[str, float]  # convolution -> MACs of one image


class Network(_Macs, total=False):
    """One network of `layers.json`."""

    precision: str  # that it is timed in; default: the one asked for


class _Probe(TypedDict):
    networks: List[Network]  # the first one at full width
    nodes: Dict[str, str]  # convolution -> the part of a node's name that it and its activation share
    imgsz: List[int]  # [height, width] of the input, px


class Probe(_Probe, total=False):
    """`layers.json`."""

    convs: Dict[str, str]  # convolution -> its ONNX node; each has to have a node of the engine to itself


class LayerTable(TypedDict):
    """The table. A curve is a list of [MACs, ms], one a network."""

    schema: int
    runtime: str
    precision: str
    imgsz: List[int]  # [height, width] of the input, px
    threads: Optional[int]  # of one inference on a CPU; null: every usable processor
    device: DeviceState
    whole_ms: float  # one inference of the first network
    layers: Dict[str, List[List[float]]]  # convolution -> its curve, activation included
    rest: List[List[float]]  # of all other nodes, over the square root of all MACs


def take(folder: Path, runtime: str, precision: str, threads: Optional[int] = None) -> LayerTable:
    """Build each network of the folder, time its layers and the whole, and return the table.

    Raises:
        EngineError: not a folder of `probe`, the library rejects a network, or a convolution of `convs` cannot be told apart.
        RuntimeUnavailable: the library is missing.
    """
    described = _described(folder)
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
        _require_apart(nodes, described.get("convs", {}), "{} of {}".format(network["file"], runtime))
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
    """The lowest of the medians of a few openings: other work, or badly placed threads, only ever make it slower."""
    medians = []
    for _ in range(ROUNDS):
        with open_engine(engine, threads=threads) as backend:
            shape = (backend.batch or 1, backend.channels) + tuple(backend.imgsz)
            images = np.random.default_rng(0).random(shape, dtype=np.float32)
            medians.append(float(np.median(measure(backend.bind(images), TIMED_RUNS))))
    return min(medians)


def _in_turn(engines: Sequence[Path], threads: Optional[int]) -> List[Dict[str, float]]:
    """Node times of each engine, the least over the rounds."""
    rounds: List[List[Dict[str, float]]] = [[] for _ in engines]
    for _ in range(ROUNDS):
        for index, engine in enumerate(engines):
            with open_engine(engine, threads=threads) as backend:
                rounds[index].append(backend.node_ms(PROFILED_RUNS))
    return [{name: min(each[name] for each in taken if name in each) for name in taken[0]} for taken in rounds]


def _described(folder: Path) -> Probe:
    """`layers.json`, if it has the form that `yolo-compress probe` gives it.

    Raises:
        EngineError: it has not, or is not there.
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
            raise ValueError("of another form")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{folder}: no readable {LAYERS} ({error}); write it with yolo-compress probe") from error
    return found


def _by_layer(nodes_ms: Dict[str, float], convs: Dict[str, str]) -> Dict[str, float]:
    """Sum by convolution; "" takes what belongs to none. A library's name holds the ONNX name of what it fused."""
    totals: Dict[str, float] = {"": 0.0}
    places = sorted(convs.items(), key=lambda item: -len(item[1]))  # /a/conv10 before /a/conv1
    for node, ms in nodes_ms.items():
        owner = next((conv for conv, place in places if place in node), "")
        totals[owner] = totals.get(owner, 0.0) + ms
    return totals


def _require_apart(nodes_ms: Dict[str, float], convs: Dict[str, str], where: str) -> None:
    """Every convolution has a node that names it and no other: a node of several gives no time of any.

    Raises:
        EngineError: names the first convolution that has none, and the nodes that it shares.
    """
    named = {node: [conv for conv, name in convs.items() if name in node] for node in nodes_ms}
    for conv, name in convs.items():
        if [conv] not in named.values():
            shared = [node for node, held in named.items() if conv in held]
            raise EngineError(
                f"{where}: none of {len(nodes_ms)} timed nodes is {conv} ({name}) alone, "
                + (f"it is fused into {', '.join(shared)}" if shared else "and none names it")
                + "; its milliseconds are not known, only its GFLOPs"
            )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the table as one JSON document."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=sorted(BACKENDS), required=True)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    return guarded(
        lambda: answer(json.dumps(take(options.folder, options.runtime, options.precision, options.threads)))
    )


if __name__ == "__main__":
    sys.exit(main())
