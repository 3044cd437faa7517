"""Targets of `yolo-compress bundle`: inference servers that can run the detector on the robot, such as Triton.

Each target has a module that writes the server's configuration into the bundle and checks the configuration. The formats follow the
server's source code and documentation, which the module cites. No server has loaded the files yet.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from yolo_compress.bundle.launchers import launcher
from yolo_compress.bundle.network_io import read
from yolo_compress.bundle.targets import deepstream, isaac_ros, triton
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.messages import got
from yolo_compress.runtime.secure.signed_manifest import Versioned

TARGETS: dict[str, ModuleType | None] = {
    "plain": None,
    "isaac_ros": isaac_ros,
    "deepstream": deepstream,
    "triton": triton,
}
"""Each module has `write(directory, network, about, precision) -> files` and `check(directory, network, about)`."""
ROS2_NODE = "ros2_node.py"


def write(target: str, directory: Path, about: Versioned) -> list[str]:
    """Write the configuration of an inference server into a bundle, and check the written files against the models.

    Every target also gets `ros2_node.py`, a ROS 2 node that uses the bundle's own runtime.

    Args:
        target: Key of TARGETS.
        directory: Folder of the bundle, with the ONNX files in it.
        about: Entries of the manifest: `name`, `version`, `names`, and `onnx` (a dict from stem to file below `directory`).

    Returns:
        The written files, relative to `directory`.

    Raises:
        RecipeError: There is no such target, or the target cannot use this model.
    """
    if target not in TARGETS:
        raise RecipeError(f"target: got {got(target)}, expected {', '.join(TARGETS)}")
    (directory / ROS2_NODE).write_text(launcher("ros2_node"), encoding="utf-8")
    module = TARGETS[target]
    if module is None:
        return [ROS2_NODE]
    if "fp32" not in about["onnx"]:
        raise RecipeError(
            f"target {target}: the bundle has no fp32.onnx, which the target needs; add fp32 to export.precisions"
        )
    network = read(directory / about["onnx"]["fp32"])
    precision = next(stem for stem in ("int8", "fp16", "fp32") if stem in about["onnx"])
    files: list[str] = module.write(directory, network, about, precision)
    check(target, directory, about)
    return [ROS2_NODE, *files]


def check(target: str, directory: Path, about: Versioned) -> None:
    """Check a target's files against the models of the bundle.

    Raises:
        RecipeError: A value differs. The message has the file and the field.
    """
    module = TARGETS[target]
    if module is not None:
        module.check(directory, read(directory / about["onnx"]["fp32"]), about)
