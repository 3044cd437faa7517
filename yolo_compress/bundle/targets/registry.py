"""What each way of running the detector expects beside the bundle, written, and read back against the network itself.

None of the three servers has run on what is written here: it follows their sources and documents, named in each file.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from yolo_compress.bundle.launchers import launcher
from yolo_compress.bundle.network_io import read
from yolo_compress.bundle.targets import deepstream, isaac_ros, triton
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.messages import got
from yolo_compress.runtime.secure.seal import Versioned

TARGETS: dict[str, ModuleType | None] = {
    "plain": None,
    "isaac_ros": isaac_ros,
    "deepstream": deepstream,
    "triton": triton,
}
"""Each module has `write(directory, network, about, precision) -> files` and `check(directory, network, about)`."""
ROS2_NODE = "ros2_node.py"


def write(target: str, directory: Path, about: Versioned) -> list[str]:
    """Writes a target's files into a bundle that is being filled, and checks them.

    Args:
        target: of TARGETS. All get `ros2_node.py`, a ROS 2 node around the bundle's own runtime.
        directory: holds the networks already.
        about: of the manifest: name, version, names, onnx (stem to file below `directory`).

    Returns:
        What was written, relative to `directory`.

    Raises:
        RecipeError: no such target, or its contract cannot be kept by this network.
    """
    if target not in TARGETS:
        raise RecipeError(f"target: got {got(target)}, expected {', '.join(TARGETS)}")
    (directory / ROS2_NODE).write_text(launcher("ros2_node"), encoding="utf-8")
    module = TARGETS[target]
    if module is None:
        return [ROS2_NODE]
    if "fp32" not in about["onnx"]:
        raise RecipeError(f"target {target}: the bundle has no fp32.onnx, which its configuration is written for")
    network = read(directory / about["onnx"]["fp32"])
    precision = next(stem for stem in ("int8", "fp16", "fp32") if stem in about["onnx"])
    files: list[str] = module.write(directory, network, about, precision)
    check(target, directory, about)
    return [ROS2_NODE, *files]


def check(target: str, directory: Path, about: Versioned) -> None:
    """Compares a target's files with the networks of the bundle.

    Raises:
        RecipeError: names the file and the field.
    """
    module = TARGETS[target]
    if module is not None:
        module.check(directory, read(directory / about["onnx"]["fp32"]), about)
