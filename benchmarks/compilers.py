"""Compilers of whole graphs (IREE, TVM, AOTInductor) against OpenVINO and ONNX Runtime: the same FP32 model, in turn.

    pip install iree-base-compiler iree-base-runtime apache-tvm       # in an environment of their own, beside this package's
    python benchmarks/compilers.py --models yolov8n.yaml:320 yolov8s.yaml:640 --threads 2
    python benchmarks/compilers.py --only tvm openvino --tvm-trials 2000       # hours; without trials TVM has no schedule

IREE and TVM compile the ONNX file, AOTInductor (in torch) the module that it was traced from; a checkpoint in place of a yaml works,
too. Largest difference of outputs from ONNX Runtime in noise. One process a compiler, rounds in turn; `slower` is the median over
rounds of the ratio of medians to the faster of OpenVINO and ONNX Runtime. What is not installed is left out with a line. Prints a
markdown table, and on the last line JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yolo_compress.export.float_onnx import export_onnx, prepare
from yolo_compress.runtime.backends.onnx_metadata import names_and_imgsz
from yolo_compress.runtime.engine import BACKENDS, open_engine
from yolo_compress.runtime.measure.device import device_state
from yolo_compress.runtime.measure.interleaved import measure_in_turn
from yolo_compress.runtime.measure.latency import main as serve
from yolo_compress.store import environment
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint

Run = Callable[[np.ndarray], np.ndarray]  # images [1, 3, H, W] -> output0
BOTH = ("onnxruntime", "openvino")


class Compiler(NamedTuple):
    """A compiler of this benchmark.

    Attributes:
        compile: compiles `model.onnx` in a folder, for a number of threads; the arguments of the command line are also given.
        open: opens in a process of its own what `compile` wrote.
    """

    compile: Callable[[Path, argparse.Namespace], None]
    open: Callable[[Path, int], Run]


def compile_iree(folder: Path, args: argparse.Namespace) -> None:
    from iree.compiler.tools import compile_file

    words = [sys.executable, "-m", "iree.compiler.tools.import_onnx", "model.onnx", "-o", "model.mlir"]
    subprocess.run(words, cwd=folder, check=True)
    compile_file(
        str(folder / "model.mlir"),
        input_type="onnx",
        target_backends=["llvm-cpu"],
        output_file=str(folder / "model.vmfb"),
        extra_args=["--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3"],
    )


def open_iree(folder: Path, threads: int) -> Run:
    import onnx
    from iree import runtime

    runtime.flags.parse_flags(f"--task_topology_group_count={threads}")
    context = runtime.SystemContext(config=runtime.Config("local-task"))
    context.add_vm_module(runtime.VmModule.mmap(context.instance, str(folder / "model.vmfb")))
    name = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.name
    function = context.modules.module[name]
    return lambda images: np.asarray(function(images).to_host())


def compile_tvm(folder: Path, args: argparse.Namespace) -> None:
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    os.environ["TVM_NUM_THREADS"] = str(args.threads)
    cpu = tvm.target.codegen.llvm_get_system_cpu()
    target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": args.threads})
    model = from_onnx(onnx.load(str(folder / "model.onnx")))
    if args.tvm_trials:
        tuned = relax.get_pipeline(
            "static_shape_tuning", target=target, total_trials=args.tvm_trials, work_dir=str(folder / "tuning")
        )
        model = tuned(model)
    tvm.compile(model, target).export_library(str(folder / "model.so"))


def open_tvm(folder: Path, threads: int) -> Run:
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "model.so")), tvm.cpu())
    return lambda images: machine["main"](tvm.runtime.tensor(images)).numpy()


def compile_inductor(folder: Path, args: argparse.Namespace) -> None:
    import torch

    module = torch.load(folder / "module.pt", weights_only=False)  # this program wrote it
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        traced = torch.export.export(module, (torch.zeros(1, 3, *names_and_imgsz(folder / "model.onnx")[1]),))
        torch._inductor.aoti_compile_and_package(traced, package_path=str(folder / "model.pt2"))


def open_inductor(folder: Path, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    model = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    return lambda images: model(torch.from_numpy(images)).numpy()


COMPILERS = {
    "iree": Compiler(compile_iree, open_iree),
    "tvm": Compiler(compile_tvm, open_tvm),
    "aotinductor": Compiler(compile_inductor, open_inductor),
}


class Compiled:
    """What `measure.latency` reads of a backend."""

    precision, channels, batch, names = "fp32", 3, 1, ()

    def __init__(self, spec: dict[str, Any]) -> None:
        folder = Path(spec["engine"])
        self.executed, self.threads = f"{folder.name} fp32", spec["threads"]
        self.imgsz = names_and_imgsz(folder / "model.onnx")[1]
        self.run = COMPILERS[folder.name].open(folder, self.threads)

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        return self.run(images_BCHW)

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        return lambda: self.run(images_BCHW)

    def __enter__(self) -> Compiled:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def outputs(folder: Path, noise: np.ndarray, threads: int) -> np.ndarray:
    """Return the outputs of a compiled model or an engine, computed in another process."""
    np.save(folder / "noise.npy", noise)
    subprocess.run([sys.executable, __file__, "--outputs", str(folder), "--threads", str(threads)], check=True)
    found: np.ndarray = np.load(folder / "outputs.npy")
    return found


def write_outputs(folder: Path, threads: int) -> None:
    noise = np.load(folder / "noise.npy")
    if folder.name in COMPILERS:
        with Compiled({"engine": str(folder), "threads": threads}) as compiled:
            found = [compiled(image[None]) for image in noise]
    else:
        with open_engine(folder, threads=threads) as engine:
            found = [engine(image[None]) for image in noise]
    np.save(folder / "outputs.npy", np.concatenate(found))


def compile_all(model_name: str, size: tuple[int, int], scratch: Path, args: argparse.Namespace) -> dict[str, float]:
    """Compile a model with everything that is installed, each in a folder of its name. Return the seconds of each."""
    import torch

    if model_name.endswith(".yaml"):
        model = checkpoint.new_model(model_name, [str(i) for i in range(80)], 3, seed=0)
    else:
        model = checkpoint.load_model(find_weights(model_name))
    names, seconds = tuple(model.names.values()), {}
    export_onnx(model, scratch / "model.onnx", size, names=names)
    module = prepare(model, size, names, 1, "onnx")[0]
    for name in dict.fromkeys((*BOTH, *(args.only or COMPILERS))):
        folder = scratch / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes((scratch / "model.onnx").read_bytes())
        start = time.perf_counter()
        try:
            if name in COMPILERS:
                torch.save(module, folder / "module.pt")
                COMPILERS[name].compile(folder, args)
            else:
                BACKENDS[name].build(scratch / "model.onnx", folder, "fp32")
        except ImportError as error:
            print(f"{name}: left out, it is not installed ({error})", file=sys.stderr)
            continue
        except Exception as error:  # a compiler raises whatever it does
            print(f"{name}: left out, it does not compile {model_name}: {str(error)[-500:]}", file=sys.stderr)
            continue
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {model_name} compiled in {seconds[name]:.0f} s", file=sys.stderr)
    return seconds


def compared(model_name: str, size: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each compiler and runtime."""
    noise = np.random.default_rng(0).random((args.images, 3, *size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = compile_all(model_name, size, Path(scratch), args)
        if missing := sorted(set(BOTH) - seconds.keys()):
            raise SystemExit(
                f"{', '.join(missing)}: not installed, and everything is compared with both of {', '.join(BOTH)}"
            )
        found = {name: outputs(Path(scratch, name), noise, args.threads) for name in seconds}
        specs: list[Any] = [
            {"label": name, "engine": str(Path(scratch, name)), "threads": args.threads, "warmup_n": args.warmup}
            | ({"module": "compilers"} if name in COMPILERS else {})
            for name in seconds
        ]
        taken = measure_in_turn(specs, args.rounds, args.samples)
    medians = np.array([[np.median(one) for one in each["rounds_ms"]] for each in taken])
    faster = medians[: len(BOTH)].min(axis=0)
    return [
        {
            "model": model_name, "imgsz": size[0], "by": name, "compile_s": seconds[name],
            "box_difference_px": float(np.abs(found[name] - found[BOTH[0]])[:, :4].max()),
            "score_difference": float(np.abs(found[name] - found[BOTH[0]])[:, 4:].max()),
            "p50_ms": float(np.median(medians[index])), "slower": float(np.median(medians[index] / faster)),
            "quiet": taken[index]["quiet"],
        }
        for index, name in enumerate(seconds)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov8n.yaml:320", "yolov8s.yaml:640"], metavar="MODEL:SIZE")
    parser.add_argument("--only", nargs="+", choices=list(COMPILERS), help="compilers; default: all")
    parser.add_argument("--tvm-trials", type=int, default=0, help="trials of TVM's MetaSchedule, over all operators")
    parser.add_argument("--images", type=int, default=4, help="images of noise whose outputs are compared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=10, help="calls before the first round")
    parser.add_argument("--outputs", type=Path, help=argparse.SUPPRESS)  # a process of this program itself
    args = parser.parse_args()
    if args.outputs:
        write_outputs(args.outputs, args.threads)
        return
    here = str(Path(__file__).resolve().parent)  # the measuring processes import this file
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    rows: list[dict[str, Any]] = []
    for text in args.models:
        name, _, side = text.rpartition(":")
        rows += compared(name, (int(side), int(side)), args)
    described = environment.describe()
    print(f"threads {args.threads}, n = {args.rounds} rounds of {args.samples}; {described['cpu']}, {device_state()}\n")
    print("| model | px | by | compiled in s | boxes apart, px | scores apart | p50 ms | slower | quiet |")
    print("|---" * 9 + "|")
    for row in rows:
        print(
            f"| {row['model']} | {row['imgsz']} | {row['by']} | {row['compile_s']:.0f} | {row['box_difference_px']:.2g} "
            f"| {row['score_difference']:.2g} | {row['p50_ms']:.2f} | {row['slower']:.2f}x | {row['quiet']} |"
        )
    print(json.dumps({"settings": vars(args), "rows": rows, "environment": described}))


if __name__ == "__main__":
    # the parent of a measuring process names a module and gives no argument
    if len(sys.argv) == 1 and __spec__ is not None:
        sys.exit(serve(Compiled))
    main()
