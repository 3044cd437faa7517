"""The list of runtimes (CoreML, LiteRT, NCNN, ONNX Runtime, OpenVINO, TensorRT), with their names, INT8 files and backends.

This is the only such list: the command line, the recipe, `lint`, `export`, `bench`, the report, the bundle and the robot's commands
read it. To add a runtime, add an entry here and a `Backend` in `backends/`. docs/extending.md has an example.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Dict, Iterator, Literal, NamedTuple, Optional, Tuple, get_args

Precision = Literal["fp32", "fp16", "int8"]
INT8_IMAGES = "int8_images"  # option of a build: the INT8 engine takes images as INT8 values
OWN_FILE = "-own"  # ends the name of a row for the runtime's own INT8 file if its engine was built from another file
PRECISIONS: Tuple[Precision, ...] = get_args(Precision)


class Int8File(NamedTuple):
    """An INT8 file that `export` writes for a runtime.

    Attributes:
        stem: File name without `.onnx`.
        form: Name of this kind of INT8 file, a target of `export.qdq.insert_qdq`. If the installed version of the runtime takes
            another kind, the report shows this name in place of the runtime.
        title: Title in the report for this kind of file.
        lint: Target of `lint` that the file is checked against.
        zero_point: Zero point of activations: 0 (INT8) or 128 (UINT8). None: the file has no Q/DQ, and the scales are in another
            file.
        quantised_outputs: Whether the outputs of convolutions are also quantised before the activation.
        half: Whether the float tensors between Q/DQ pairs, and the scales, are float16.
        forwarding_pairs: Whether the outputs of layers that only move values (pool, upsample, chunk, concatenation) have a pair, too.
    """

    stem: str
    form: str
    title: str
    lint: str = ""
    zero_point: Optional[int] = None
    quantised_outputs: bool = False
    half: bool = False
    forwarding_pairs: bool = True


class Runtime(NamedTuple):
    """A library that executes engines, with all properties that the package uses.

    Attributes:
        name: Name in recipes, options and engine folders (`onnxruntime-int8`).
        title: Name in the report.
        about: Version and device that the rules of `lint` for this runtime were checked with.
        package: Distribution whose version goes into the fingerprint of `engine` and `bench`.
        needs: Software that must be installed on a robot.
        backend: `module:class` below `runtime/`, imported on use.
        int8: INT8 files that `export` writes for this runtime.
        also: Stems of INT8 files for other runtimes that this one also runs wholly in INT8. An engine is built from the file that suits
            the processor (`measure.int8_file`).
        gpu: Whether engines run on a GPU. Such engines run only on the device that built them.
        takes_threads: Whether engines have an option `threads`.
        opsets: Smallest and largest ONNX operator set that the runtime reads. None: no known limit.
        build_options: Additional options of the backend's `build`.
        most_images: Largest number of images in one inference; None: no limit.
        module: Module that `probe` imports and that has the version of the library. "": `name`.
        takes: Stem of the INT8 file of another runtime that engines are built from, if `int8` is empty.
        times_layers: Whether the library reports the time of each layer (`node_ms`).
        converter: `module:function` below `runtime/`, for a runtime that does not read ONNX files itself. The function yields what the
            converter refuses in a graph. "": the runtime reads ONNX.
    """

    name: str
    title: str
    about: str
    package: str
    needs: str
    backend: str
    int8: Tuple[Int8File, ...] = ()
    also: Tuple[str, ...] = ()
    gpu: bool = False
    takes_threads: bool = True
    opsets: Tuple[Optional[int], Optional[int]] = (None, None)
    build_options: Tuple[str, ...] = ()
    most_images: Optional[int] = None
    module: str = ""
    takes: str = ""
    times_layers: bool = True
    converter: str = ""


# From the slowest to the fastest, as measured by bench.py. The last one that is installed is the default on a robot.
RUNTIMES: Dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime(
            name="coreml",  # never measured, so it is no default
            title="CoreML",
            about="CoreML of iOS 17 and macOS 14, written by coremltools 9.0",
            package="coremltools",
            needs="coremltools and onnx on macOS",
            backend="backends.coreml:CoreMLBackend",
            module="coremltools",
            takes="int8-tensorrt11",
            takes_threads=False,
            times_layers=False,
            converter="backends.coreml_program:faults",
        ),
        Runtime(
            name="litert",
            title="LiteRT",
            about="LiteRT 2.3, CPU, XNNPACK",
            package="ai-edge-litert",
            needs="ai-edge-litert and onnx",
            backend="backends.litert:LiteRtBackend",
            module="ai_edge_litert",
            takes="int8-onnxruntime",
            build_options=(INT8_IMAGES,),
            times_layers=False,
            converter="backends.litert_convert:faults",
        ),
        Runtime(
            name="ncnn",
            title="NCNN",
            about="NCNN 1.0.20261020, CPU",
            package="ncnn",
            needs="ncnn",
            backend="backends.ncnn:NcnnBackend",
            takes="int8",
            most_images=1,
            converter="backends.ncnn_convert:faults",
        ),
        Runtime(
            name="onnxruntime",
            title="ONNX Runtime",
            about="ONNX Runtime 1.32, CPU",
            package="onnxruntime",
            needs="onnxruntime",
            backend="backends.ort:OrtBackend",
            int8=(
                # ONNX Runtime fuses a convolution only if its output is quantised.
                Int8File("int8-onnxruntime", "onnxruntime", "ONNX Runtime", "onnxruntime", 128, quantised_outputs=True),
            ),
            opsets=(7, 28),
        ),
        Runtime(
            name="openvino",
            title="OpenVINO",
            about="OpenVINO 2026.4, CPU",
            package="openvino",
            needs="openvino",
            backend="backends.openvino:OpenVINOBackend",
            # Signed activations (int8.onnx) lose most of the mAP on AVX2 and on an AMD EPYC with VNNI. A pair behind a layer that only
            # moves values becomes a node of its own: 38 of them in YOLOv8n, for the same output.
            int8=(Int8File("int8-openvino", "openvino", "OpenVINO", "openvino", 128, forwarding_pairs=False),),
            also=("int8",),
        ),
        Runtime(
            name="tensorrt",
            title="TensorRT",
            about="TensorRT 8.5 to 11.4, all of them",
            package="tensorrt",
            needs="TensorRT with cuda-python or pycuda (JetPack has them)",
            backend="backends.tensorrt.run:TensorRTBackend",
            int8=(
                # Weakly typed: FP16 is a builder flag, so float32 between INT8 layers is not an error.
                Int8File("int8", "tensorrt10", "TensorRT 8 to 10", "tensorrt-10.3", 0),
                Int8File("int8-tensorrt11", "tensorrt11", "TensorRT 11", "tensorrt-11.4", 0, half=True),
                Int8File("int8-implicit", "tensorrt-cache", "TensorRT with calibration cache"),
            ),
            gpu=True,
            takes_threads=False,
            opsets=(9, 17),
            build_options=("workspace_mib", "timing_cache"),
        ),
    )
}


def names(gpu: Optional[bool] = None, times_layers: bool = False) -> Tuple[str, ...]:
    """Return the names of the runtimes on a GPU (`gpu` is True), on the CPU (False), or of all (None).

    If `times_layers` is set, leave out the runtimes that do not report the time of each layer.
    """
    rows = [row for row in RUNTIMES.values() if row.times_layers or not times_layers]
    return tuple(row.name for row in rows if gpu is None or row.gpu == gpu)


def with_option(option: str) -> Tuple[str, ...]:
    """Return the names of the runtimes whose `build` takes this option, such as `workspace_mib`."""
    return tuple(row.name for row in RUNTIMES.values() if option in row.build_options)


def titles() -> Dict[str, str]:
    """Return a dict from the name of each runtime, and of each kind of INT8 file (`form`), to its title in a report."""
    title_by_name = {row.name: row.title for row in RUNTIMES.values()}
    for row in RUNTIMES.values():
        for file in row.int8:
            title_by_name.setdefault(file.form, file.title)
        if row.also:
            title_by_name[f"{row.name}{OWN_FILE}"] = f"{row.title}, its own file"
    return title_by_name


def qdq_forms() -> Dict[str, Int8File]:
    """Return a dict from the name of each kind of INT8 file with Q/DQ nodes (`form`) to its `Int8File`."""
    return {file.form: file for row in RUNTIMES.values() for file in row.int8 if file.zero_point is not None}


def int8_file(stem: str) -> Optional[Tuple[Runtime, Int8File]]:
    """Return the `Runtime` and the `Int8File` of an INT8 file. `stem` is the file's name without `.onnx`. None for other files."""
    for row in RUNTIMES.values():
        for file in row.int8:
            if file.stem == stem:
                return row, file
    return None


def backend(name: str) -> Any:
    """Return the `Backend` class of a runtime. Its library is imported only when an engine is built or opened."""
    return _imported(RUNTIMES[name].backend)


def refusals(name: str, model: Any, file: Path) -> Iterator[Tuple[str, str]]:
    """Yield the name of a node and a reason for all that the converter of a runtime refuses in an ONNX model. The model is changed.

    What depends on trained weights, such as a bias too large for the format, is only known when an engine is built.

    Args:
        model: `onnx.ModelProto`.
        file: its file, for error messages.

    Raises:
        EngineError: the model is not a graph of fixed shapes with one input and one output.
    """
    if RUNTIMES[name].converter:
        yield from _imported(RUNTIMES[name].converter)(_imported("backends.onnx_graph:of")(model, file))


def _imported(where: str) -> Any:
    module, _, attribute = where.partition(":")
    return getattr(import_module("." + module, __package__), attribute)
