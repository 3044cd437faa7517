"""Run a CoreML ML program in torch, layer by layer, in float32: CoreML itself runs on a Mac alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_compress.runtime.backends.coreml_convert import library


def load(package: Path) -> tuple[Any, Any]:
    """Return the specification of a package, and the ML program in it as coremltools reads it back from the files."""
    coremltools = library()
    from coremltools.converters.mil.frontend.milproto.load import load as read

    spec = coremltools.utils.load_spec(str(package))
    program = spec.pipeline.models[0] if spec.HasField("pipeline") else spec
    weights = str(package / "Data" / "com.apple.CoreML" / "weights")
    return spec, read(program, program.specificationVersion, weights).functions["main"]


def run(program: Any, images: Tensor) -> list[np.ndarray]:
    """Return the outputs of the program for images of the shape of its input. All tensors are float32."""
    values: dict[Any, Any] = {next(iter(program.inputs.values())): images}

    def value(var: Any) -> Any:
        if isinstance(var, (list, tuple)):
            return [value(one) for one in var]
        if var in values:
            return values[var]
        stored = var.val
        if isinstance(stored, np.ndarray) and stored.dtype.kind == "f":
            return torch.from_numpy(stored.astype(np.float32))
        return torch.tensor(float(stored)) if isinstance(stored, np.floating) else stored

    for layer in program.operations:
        if layer.op_type == "const":
            continue
        made = LAYERS[layer.op_type](**{key: value(var) for key, var in layer.inputs.items() if var is not None})
        values.update(zip(layer.outputs, made if len(layer.outputs) > 1 else [made], strict=True))
    return [values[one].numpy() for one in program.outputs]


def _conv(
    x: Tensor, weight: Tensor, strides: Any, pad_type: str, pad: Any, dilations: Any, groups: int, bias: Any = None
) -> Tensor:
    assert pad_type == "custom"
    padded = F.pad(x, [int(side) for side in (pad[2], pad[3], pad[0], pad[1])])
    return F.conv2d(padded, weight, bias, tuple(strides.tolist()), 0, tuple(dilations.tolist()), int(groups))


def _pool(x: Tensor, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: Any = False) -> Tensor:
    assert pad_type == "custom" and not ceil_mode
    padded = F.pad(x, [int(side) for side in (pad[2], pad[3], pad[0], pad[1])], value=-torch.inf)
    return F.max_pool2d(padded, tuple(kernel_sizes.tolist()), tuple(strides.tolist()))


def _sliced(x: Tensor, begin: Any, end: Any, squeeze_mask: Any, **_same: Any) -> Tensor:
    part = x[tuple(slice(int(first), int(last)) for first, last in zip(begin, end, strict=True))]
    return part.squeeze([axis for axis, gone in enumerate(squeeze_mask) if gone]) if any(squeeze_mask) else part


def _weight(quantized_data: np.ndarray, zero_point: Any, scale: Tensor, axis: Any) -> Tensor:
    assert int(zero_point) == 0 and int(axis) == 0
    return torch.from_numpy(quantized_data.astype(np.float32)) * scale.view(-1, *[1] * (quantized_data.ndim - 1))


LAYERS: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "cast": lambda x, dtype: x,
    "concat": lambda values, axis, interleave=False: torch.cat(values, int(axis)),
    "constexpr_affine_dequantize": _weight,
    "conv": _conv,
    "dequantize": lambda input, scale: input * scale,
    "exp": lambda x: x.exp(),
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, float(alpha)),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: x @ y,
    "max_pool": _pool,
    "mul": lambda x, y: x * y,
    "quantize": lambda input, scale, output_dtype: (input / scale).round().clamp(-128, 127),
    "real_div": lambda x, y: x / y,
    "reduce_max": lambda x, axes, keep_dims: x.amax([int(axis) for axis in axes], bool(keep_dims)),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: x * x.sigmoid(),
    "slice_by_index": _sliced,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": lambda x, split_sizes, axis: x.split(split_sizes.tolist(), int(axis)),
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "upsample_nearest_neighbor": lambda x, scale_factor_height, scale_factor_width: x.repeat_interleave(
        int(scale_factor_height), 2
    ).repeat_interleave(int(scale_factor_width), 3),
}
