"""Input and output of the networks of a bundle: one form for every precision, since any of them may be put in another's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolo_compress.bundle.network_io import read
from yolo_compress.errors import GateFailed


def check_signatures(files: Sequence[Path], imgsz_hw: tuple[int, int], classes: int, channels: int = 3) -> None:
    """Asserts `images` [B, channels, H, W] and `output0` [B, 4 + classes, A], float32, with the same B and A in all files.

    Raises:
        GateFailed: names the file.
        RecipeError: a file has more than one input or output.
    """
    found = {file: (network.input, network.output) for file in files for network in [read(file)]}
    for file, (taken, given) in found.items():
        named = [(tensor.name, tensor.kind) for tensor in (taken, given)] == [("images", "FLOAT"), ("output0", "FLOAT")]
        shaped = taken.shape[1:] == (channels, *imgsz_hw) and len(given.shape) == 3 and given.shape[1] == 4 + classes
        if not named or not shaped:
            raise GateFailed(
                f"{file.name}: takes {taken}, gives {given}; images [B, {channels}, {imgsz_hw[0]}, {imgsz_hw[1]}] and "
                f"output0 [B, {4 + classes}, anchors], both float32, expected"
            )
    first = files[0]
    for file in files[1:]:
        if found[file] != found[first]:
            raise GateFailed(f"{file.name}: takes and gives {found[file]}, {first.name} {found[first]}; export again")
