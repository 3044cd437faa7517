"""Build an engine from the INT8 file that suits this processor: its boxes are right here, and it is the fastest such file.

A runtime may take several INT8 files of one network (`registry.Runtime.also`). They hold the same weights and scales, but the library
runs them in different kernels. Which file is faster depends on the processor, and a library may even compute wrong boxes from one of
them: OpenVINO 2026.4 loses nearly all boxes with signed activations on an AMD EPYC with VNNI. So each file is tried.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from .. import registry
from ..backends.base import Backend, EngineInfo, Tried, load_info, save_info
from ..engine import BACKENDS, open_engine
from ..errors import EngineError
from .interleaved import measure_in_turn
from .messages import Measured, Spec

ROUNDS, CALLS = 6, 20  # an even number of rounds cancels linear drift, see interleaved.py
LEAST_GAIN = 0.03  # a file replaces the runtime's own file only if it saves more than this share of the time
Check = Callable[[Backend, EngineInfo], Optional[str]]


class WrongBoxes(EngineError):
    """On this processor, no INT8 file of a model gives the right boxes."""


def build_suited(
    runtime: str,
    files: Sequence[Path],
    out: Path,
    wrong: Check,
    names: Optional[Sequence[str]] = None,
    imgsz: Optional[Tuple[int, int]] = None,
    threads: Optional[int] = None,
) -> Path:
    """Build an INT8 engine in `out` from each file in turn, and keep the best. The sidecar `engine.json` says what was tried.

    Args:
        runtime: key of `BACKENDS`.
        files: ONNX files of the same network, the runtime's own file first. Their names must differ.
        out: folder of the engine. It is made.
        wrong: called with each opened engine and its description. It returns why the engine's boxes are wrong, or None if they
            are right.
        names, imgsz: as in `Backend.build`.
        threads: threads of one inference while the engines are timed. None: one per usable processor.

    Returns:
        The file that the engine was built from.

    Raises:
        WrongBoxes: the boxes of every file are wrong, or the library rejects every file.
        LatencyError: an engine that opened here could not be timed.
    """
    folders = {file: out / f"try-{file.stem}" for file in files}
    tried: Dict[str, Tried] = {}
    for file, folder in folders.items():
        reason = None
        try:
            BACKENDS[runtime].build(file, folder, "int8", names, imgsz)
            with open_engine(folder, threads=threads) as engine:
                reason = wrong(engine, load_info(folder))
        except EngineError as error:
            reason = str(error)
        tried[file.name] = {"p50_ms": None, "wrong": reason}
    right = [file for file in files if tried[file.name]["wrong"] is None]
    if not right:
        found = "; ".join(f"{name}: {one['wrong']}" for name, one in tried.items())
        raise WrongBoxes(f"{registry.RUNTIMES[runtime].title} computes wrong boxes on this processor ({found})")
    if len(right) > 1:
        specs: List[Spec] = [
            {"label": file.name, "engine": str(folders[file]), "threads": threads, "quick": True} for file in right
        ]
        for file, one in zip(right, measure_in_turn(specs, ROUNDS, CALLS)):
            tried[file.name]["p50_ms"] = round(_median(one), 4)
    chosen = fastest(right, tried)
    info = load_info(folders[chosen])
    for name in info.files:
        os.replace(str(folders[chosen] / name), str(out / name))
    for folder in folders.values():
        shutil.rmtree(str(folder), ignore_errors=True)
    save_info(replace(info, tried=tried), out, list(info.files))
    return chosen


def fastest(right: Sequence[Path], tried: Mapping[str, Tried]) -> Path:
    """Return the first file, or the fastest if it saves more than `LEAST_GAIN` of the first one's time."""

    def ms(file: Path) -> float:
        return tried[file.name]["p50_ms"] or 0.0

    best = min(right, key=ms)
    return best if ms(best) < (1 - LEAST_GAIN) * ms(right[0]) else right[0]


def choice(chosen: str, tried: Mapping[str, Tried]) -> str:
    """Return why a file was chosen, as text: "int8-openvino.onnx (5.29 ms); int8.onnx takes 5.41 ms"."""
    others = "; ".join(f"{name} {_found(one)}" for name, one in tried.items() if name != chosen)
    ms = tried[chosen]["p50_ms"]
    return f"{chosen}{'' if ms is None else f' ({ms:.3g} ms)'}; {others}"


def _found(one: Tried) -> str:
    return f"gives wrong boxes on this processor ({one['wrong']})" if one["wrong"] else f"takes {one['p50_ms']:.3g} ms"


def _median(one: Measured) -> float:
    return float(np.median([np.median(samples) for samples in one["rounds_ms"]]))
