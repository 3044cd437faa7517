"""Measure the latency of a torch module in a separate process, with `runtime.measure.latency`, as for an engine.

`spec` writes the module to a file and returns the spec for `measure_in_turn`. The measuring process,
`python -m yolo_compress.evaluate.torch_latency`, opens that file. So `yolo_compress.runtime` does not depend on torch.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.files.atomic import atomic_write
from yolo_compress.nets.hardening import harden
from yolo_compress.runtime.backends.base import EngineError
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.latency import main
from yolo_compress.runtime.measure.messages import Spec

MODULE = "yolo_compress.evaluate.torch_latency"


class TorchSpec(Spec, total=False):
    """Request to measure a torch module: `messages.Spec` with the file of the pickled module in place of an engine."""

    checkpoint: str  # file with the pickled module
    sha256: str  # SHA-256 of that file, hex
    names: list[str]  # class names in the order of their index
    imgsz: list[int]  # [height, width] of the input, px
    device: str  # "cpu", "cuda:0"
    precision: str


def spec(
    module: nn.Module,
    names: Sequence[str],
    imgsz: tuple[int, int],
    directory: Path,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
    **options: Any,
) -> TorchSpec:
    """Pickle the module into `directory`, and return the spec with which `measure_in_turn` measures its latency.

    Args:
        directory: scratch folder. The caller removes it.
        options: other keys of `messages.Spec` (`inputs`, `warmup_ms`, `quick`, `label`, ...).
    """
    file = directory / f"torch-{precision}.pt"
    buffer = io.BytesIO()  # torch's own writer ends the process on a full disk (2.14: c10::Error in a destructor)
    torch.save(module, buffer)
    atomic_write(file, buffer.getvalue())
    own: TorchSpec = {
        "module": MODULE,
        "checkpoint": str(file),
        "sha256": sha256_file(file),
        "names": list(names),
        "imgsz": list(imgsz),
        "device": device,
        "precision": precision,
        "threads": threads,
    }
    return cast(TorchSpec, {**options, **own})


def open_spec(described: TorchSpec) -> TorchBackend:
    """Open the module that `spec` wrote. The hash of the file is checked first, because unpickling runs code."""
    file = Path(described["checkpoint"])
    if sha256_file(file) != described["sha256"]:
        raise EngineError(f"{file}: sha256 is not the one in the spec; not loaded")
    harden()
    module = torch.load(file, map_location="cpu", weights_only=False)
    height, width = described["imgsz"]
    return TorchBackend(
        module, described["names"], (height, width), described["device"], described["precision"], described["threads"]
    )


if __name__ == "__main__":
    sys.exit(main(open_spec))
