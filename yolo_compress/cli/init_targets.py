"""Table of the device classes for `yolo-compress init`. This module does not import torch, so that the help is fast."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import auto_values


@dataclass(frozen=True)
class Target:
    """A class of devices that can run the engine, and the settings for this class.

    Attributes:
        title: Name of the device class in the first line of the recipe.
        round_to: Value of `prune.round_to`, and the reason.
        weight_bits: Value of `qat.weight_bits`, and the reason.
        smallest_px: Smallest input size of the model, px. Smaller inputs hardly save time on this device.
        after: Commands after the run; `{recipe}` is the recipe's file, `{name}` its name, `{weights}` the folder of results.
    """

    title: str
    round_to: auto_values.Choice
    weight_bits: auto_values.Choice
    smallest_px: int
    after: tuple[str, ...]


_BUNDLE = "yolo-compress bundle recipe={recipe} out={name}.tar"
_LINT = "yolo-compress lint {weights}/{name}/export/compressed/int8.onnx target=tensorrt-"
_TENSOR_CORES = auto_values.Choice(16, "Tensor Cores take 16 channels at once in FP16")
_TENSORRT_BITS = auto_values.Choice(8, "TensorRT runs 8-bit weights")
TARGETS: dict[str, Target] = {
    "cpu": Target(
        "a CPU",
        auto_values.Choice(16, "AVX-512 takes 16 channels at once"),
        auto_values.Choice(7, "8-bit weights saturate on a CPU without VNNI"),
        320,
        (_BUNDLE,),
    ),
    "gpu": Target("an NVIDIA GPU with TensorRT", _TENSOR_CORES, _TENSORRT_BITS, 640, (_BUNDLE,)),
    "jetson-orin": Target(
        "a Jetson Orin with JetPack 6", _TENSOR_CORES, _TENSORRT_BITS, 640, (f"{_LINT}10.3", _BUNDLE)
    ),
    "jetson-xavier": Target(
        "a Jetson Xavier with JetPack 5", _TENSOR_CORES, _TENSORRT_BITS, 640, (f"{_LINT}8.5", _BUNDLE)
    ),
}
