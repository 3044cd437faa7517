"""ONNX to a TensorRT plan, 8.5 to 11.x by feature. Never ran on real TensorRT; see run.py.

Up to 10.x precision is a builder flag; 11 took the flags away, and the graph's own types decide. So fp16 wants the
half-typed export there, and int8 is explicit Q/DQ everywhere: with float16 between the codes from 11 on, with float32 up to 10, where
FP16 is set beside INT8 (with INT8 alone, layers between Q/DQ pairs run in FP32, ultralytics #26159). fp32 clears TF32, so that it
is FP32.
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
    """Parse, configure, build, and write plan, timing cache and sidecar into `out`.

    Args:
        onnx: the export of that precision.
        out: directory to fill.
        names, imgsz: default to the ONNX's metadata.
        workspace_mib: limit of scratch memory, or TensorRT's default.
        max_batch: largest batch of a graph with a dynamic one.
        timing_cache: file of an earlier build, to start from (same device and version; TensorRT ignores it otherwise).

    Raises:
        RuntimeUnavailable: bindings, driver or device missing.
        EngineError: the parser or builder refuses, or the graph cannot give the precision.
    """
    trt = library()
    options: Options = {"max_batch": max_batch, "workspace_mib": workspace_mib}
    info = describe_onnx(onnx, RUNTIME, precision, trt.__version__, names, imgsz, options)
    info.built_on[GPU] = cuda.device_name()  # a plan is of a GPU too
    log = logger(trt)
    log.take()
    maker = builder(trt)
    network = _parse(trt, maker, log, onnx)
    config = maker.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the precision census of `executed` needs it
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # 2:4 weights get sparse kernels where those win; others nothing
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
    cache = config.get_timing_cache()  # the one that it filled; what it was given is const to it
    (out / TIMING_CACHE).write_bytes(bytes(cache.serialize()))
    save_info(info, out, [ENGINE_FILE, TIMING_CACHE])
    return {name: out / name for name in (ENGINE_FILE, TIMING_CACHE, SIDECAR)}


def strongly_typed() -> bool:
    """Whether the TensorRT here takes precision from the graph's types alone; False where there is none."""
    try:
        return not hasattr(library().BuilderFlag, "FP16")
    except RuntimeUnavailable:
        return False


def _start_timing_cache(config: Any, earlier: Optional[Path]) -> None:
    """Start from the earlier build's cache if TensorRT takes it (same device and version), else from an empty one."""
    start = earlier.read_bytes() if earlier is not None and earlier.is_file() else b""
    cache = config.create_timing_cache(start)
    if start and (cache is None or not config.set_timing_cache(cache, False)):
        start, cache = b"", config.create_timing_cache(b"")
    if not start:
        config.set_timing_cache(cache, False)


def _parse(trt: Any, maker: Any, log: Any, onnx: Path) -> Any:
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):  # gone in 11, where nothing else exists
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = maker.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx.read_bytes()):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"{onnx}: TensorRT {trt.__version__} cannot parse it: {errors}")
    return network


def _set_precision(trt: Any, network: Any, config: Any, precision: str, onnx: Path) -> None:
    """Set the flags that the version has; where it has none, make sure that the graph is typed as asked."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    if precision == "int8" and not any(layer.type == trt.LayerType.QUANTIZE for layer in layers):
        raise EngineError(f"{onnx}: int8 asked, but the graph holds no Q/DQ nodes; give the int8 export")
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "FP16"):
        for flag in _FLAGS[precision]:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        return
    if precision == "fp16" and not _produces(layers, trt.DataType.HALF):
        raise EngineError(
            f"{onnx}: fp16 asked, but its tensors are float32 and TensorRT {trt.__version__} takes precision from the "
            "graph; give the fp16 export"
        )


def _produces(layers: List[Any], dtype: Any) -> bool:
    return any(layer.get_output(i).dtype == dtype for layer in layers for i in range(layer.num_outputs))


def _set_profile(trt: Any, maker: Any, network: Any, config: Any, max_batch: int, onnx: Path) -> None:
    """A dynamic batch needs an optimisation profile; other dynamic sizes are refused."""
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
    # Several contexts of one profile are allowed by 8.6 on demand and by later versions as a matter of course.
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        sharing = trt.PreviewFeature.PROFILE_SHARING_0806
        if not config.get_preview_feature(sharing):
            config.set_preview_feature(sharing, True)
