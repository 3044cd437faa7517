"""Check that all models of a bundle have the same input and output. A robot can then exchange one precision for another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolo_compress.bundle.network_io import read
from yolo_compress.errors import GateFailed


def check_signatures(files: Sequence[Path], imgsz_hw: tuple[int, int], classes: int, channels: int = 3) -> None:
    """Check that all files have `images` [B, channels, H, W] and `output0` [B, 4 + classes, A], float32, with the same B and A.

    Raises:
        GateFailed: A file has another input or output.
        RecipeError: A file has more than one input or output.
    """
    found = {file: (network.input, network.output) for file in files for network in [read(file)]}
    for file, (taken, given) in found.items():
        named = [(tensor.name, tensor.kind) for tensor in (taken, given)] == [("images", "FLOAT"), ("output0", "FLOAT")]
        shaped = taken.shape[1:] == (channels, *imgsz_hw) and len(given.shape) == 3 and given.shape[1] == 4 + classes
        if not named or not shaped:
            raise GateFailed(
                f"{file.name}: input {taken}, output {given}; expected images [B, {channels}, {imgsz_hw[0]}, {imgsz_hw[1]}] and "
                f"output0 [B, {4 + classes}, anchors], both float32"
            )
    first = files[0]
    for file in files[1:]:
        if found[file] != found[first]:
            raise GateFailed(
                f"{file.name}: input and output are {found[file]}, expected those of {first.name}, {found[first]}; export again"
            )
