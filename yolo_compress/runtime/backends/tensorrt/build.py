"""Build a TensorRT plan (engine file) from ONNX, for TensorRT 8.5 to 11.x. This file never ran on real TensorRT; see run.py.

The code tests which features the installed version has. Up to 10.x, precision is a builder flag. TensorRT 11 has no such flags: the
types in the graph decide.

- fp32 clears the TF32 flag, so that FP32 is used.
- fp16 needs the float16 export in TensorRT 11.
- int8 always uses explicit Q/DQ, with float16 between the Q/DQ pairs in TensorRT 11 and float32 up to 10. Up to 10, the FP16 flag is
  set too. If only the INT8 flag is set, layers between Q/DQ pairs run in FP32 (ultralytics #26159).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ...errors import EngineError, RuntimeUnavailable
from ..base import SIDECAR, Options, describe_onnx, save_info
from . import cuda
from .library import ENGINE_FILE, GPU, RUNTIME, library
from .log import builder, logger

TIMING_CACHE = "timing.cache"
_FLAGS = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}


def build(
    onnx: Path,
    out: Path,
    precision: str,
    names: Optional[Sequence[str]] = None,
    imgsz: Optional[Tuple[int, int]] = None,
    workspace_mib: Optional[int] = None,
    max_batch: int = 1,
    timing_cache: Optional[Path] = None,
) -> Dict[str, Path]:
    """Build a TensorRT plan, and write the plan, the timing cache and `engine.json` into `out`. Return the files by name.

    Args:
        onnx: ONNX file that was exported for `precision`.
        out: directory for the files.
        names, imgsz: class names, and input size (height, width) in px. None: read from the metadata of the ONNX file.
        workspace_mib: limit of scratch memory in MiB. None: TensorRT's default.
        max_batch: largest batch of a graph with a dynamic batch.
        timing_cache: timing cache of an earlier build. TensorRT ignores a cache from another device or version.

    Raises:
        RuntimeUnavailable: the bindings, the driver or a device is missing.
        EngineError: the parser or builder rejects the graph, or the graph does not have the types of the precision.
    """
    trt = library()
    options: Options = {"max_batch": max_batch, "workspace_mib": workspace_mib}
    info = describe_onnx(onnx, RUNTIME, precision, trt.__version__, names, imgsz, options)
    info.built_on[GPU] = cuda.device_name()  # a plan depends on the GPU
    log = logger(trt)
    log.take()
    maker = builder(trt)
    network = _parse(trt, maker, log, onnx)
    config = maker.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the precision census of `executed` needs it
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # allows sparse kernels for 2:4 weights, where they are faster
    _set_precision(trt, network, config, precision, onnx)
    _set_profile(trt, maker, network, config, max_batch, onnx)
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    _start_timing_cache(config, timing_cache)
    plan = maker.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{onnx}: TensorRT {trt.__version__} built no {precision} engine{log.words()}; its log (stderr) says more"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / ENGINE_FILE).write_bytes(bytes(plan))
    cache = config.get_timing_cache()  # TensorRT fills its own copy, not the one that it was given
    (out / TIMING_CACHE).write_bytes(bytes(cache.serialize()))
    save_info(info, out, [ENGINE_FILE, TIMING_CACHE])
    return {name: out / name for name in (ENGINE_FILE, TIMING_CACHE, SIDECAR)}


def strongly_typed() -> bool:
    """Return whether the installed TensorRT takes the precision from the types in the graph. False if TensorRT is missing."""
    try:
        return not hasattr(library().BuilderFlag, "FP16")
    except RuntimeUnavailable:
        return False


def _start_timing_cache(config: Any, earlier: Optional[Path]) -> None:
    """Set the timing cache of a build: the cache of an earlier build on the same device and version, else an empty cache."""
    start = earlier.read_bytes() if earlier is not None and earlier.is_file() else b""
    cache = config.create_timing_cache(start)
    if start and (cache is None or not config.set_timing_cache(cache, False)):
        start, cache = b"", config.create_timing_cache(b"")
    if not start:
        config.set_timing_cache(cache, False)


def _parse(trt: Any, maker: Any, log: Any, onnx: Path) -> Any:
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):  # removed in 11, where it is always on
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = maker.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx.read_bytes()):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"{onnx}: TensorRT {trt.__version__} cannot parse it: {errors}")
    return network


def _set_precision(trt: Any, network: Any, config: Any, precision: str, onnx: Path) -> None:
    """Set the builder flags of the precision. If this TensorRT has no such flags, check the types in the graph."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    if precision == "int8" and not any(layer.type == trt.LayerType.QUANTIZE for layer in layers):
        raise EngineError(f"{onnx}: int8 requested, but the graph has no Q/DQ nodes; use the int8 export")
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "FP16"):
        for flag in _FLAGS[precision]:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        return
    if precision == "fp16" and not _produces(layers, trt.DataType.HALF):
        raise EngineError(
            f"{onnx}: fp16 requested, but its tensors are float32 and TensorRT {trt.__version__} takes the precision from "
            "the graph; use the fp16 export"
        )


def _produces(layers: List[Any], dtype: Any) -> bool:
    return any(layer.get_output(i).dtype == dtype for layer in layers for i in range(layer.num_outputs))


def _set_profile(trt: Any, maker: Any, network: Any, config: Any, max_batch: int, onnx: Path) -> None:
    """Add the optimisation profile that a dynamic batch needs. Raise EngineError for other dynamic sizes."""
    source = network.get_input(0)
    shape = tuple(source.shape)
    if -1 not in shape:
        if max_batch not in (1, shape[0]):
            raise EngineError(f"{onnx}: max_batch={max_batch}, but its batch is fixed at {shape[0]}; leave it out")
        return
    if shape[0] != -1 or -1 in shape[1:]:
        raise EngineError(f"{onnx}: input {list(shape)}; only the batch may be dynamic, export with a fixed imgsz")
    profile = maker.create_optimization_profile()
    profile.set_shape(source.name, (1,) + shape[1:], (1,) + shape[1:], (max_batch,) + shape[1:])
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{onnx}: TensorRT {trt.__version__} takes no batch from 1 to {max_batch}; its log says why")
    # Several contexts may share one profile: in 8.6 with this flag, in later versions always.
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        sharing = trt.PreviewFeature.PROFILE_SHARING_0806
        if not config.get_preview_feature(sharing):
            config.set_preview_feature(sharing, True)
