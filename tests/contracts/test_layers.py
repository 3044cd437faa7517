"""The layers of the architecture, checked by the imports: few modules import each library, and no layer imports a higher one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "yolo_compress"
FILES = sorted(PACKAGE.rglob("*.py"))

# A library, and the only files (or folders, ending in /) that may import it.
DOORS = {
    "ultralytics": {
        "train/",
        "evaluate/ultralytics_ap.py",  # its matching and AP, not its training
        "nets/",  # ultralytics.nn.modules only, see below
        "cli/fetch.py",  # its downloader, inside a function; the user asks for the download
    },
    "modelopt": {"quant/fakequant.py"},
    "pycocotools": {"evaluate/coco.py"},
    "onnxruntime": {"runtime/backends/ort.py"},
    "openvino": {"runtime/backends/openvino.py"},
    "ai_edge_litert": {"runtime/backends/litert.py", "runtime/backends/litert_file.py"},
    "coremltools": {"runtime/backends/coreml_convert.py", "runtime/backends/coreml_program.py"},
    "tensorrt": {"runtime/backends/tensorrt/library.py"},
    "cuda": {"runtime/backends/tensorrt/cuda.py"},
    "pycuda": {"runtime/backends/tensorrt/cuda.py"},
    "rclpy": {"runtime/commands/ros2_node.py"},
    "optuna": {"search/sampler.py"},
    "ray": {"search/cluster.py"},
    "cryptography": {"runtime/secure/ed25519.py"},  # if it is installed; the file also has a reference implementation
}
# Parts of the package that a part must not import directly.
UPWARDS = {"cli", "pipeline", "status", "preflight", "chain", "stages"}
METHODS_AVOID = UPWARDS | {"recipe", "report", "train", "data", "bundle", "rollout"}
FORBIDDEN = {
    "prune": METHODS_AVOID,
    "distill": METHODS_AVOID,
    "quant": METHODS_AVOID,
    "export": METHODS_AVOID | {"prune", "distill"},
    "lint": METHODS_AVOID | {"prune", "distill", "quant", "export", "store"},
    "evaluate": UPWARDS | {"recipe", "report", "bundle"},
    "train": UPWARDS | {"recipe", "report", "prune", "distill", "quant", "export", "bundle"},
    "report": UPWARDS | {"train", "prune", "distill", "quant", "export"},
    "nets": METHODS_AVOID | {"prune", "distill", "quant", "export", "evaluate", "store"},
    "store": METHODS_AVOID | {"prune", "distill", "quant", "export", "evaluate"},
    "files": METHODS_AVOID | {"prune", "distill", "quant", "export", "evaluate", "store", "nets"},
    "errors": METHODS_AVOID | {"prune", "distill", "quant", "export", "evaluate", "store", "nets", "files"},
    "data": UPWARDS | {"recipe", "train", "prune", "distill", "quant", "export", "report"},
    "recipe": UPWARDS | {"train", "prune", "distill", "quant", "export", "report", "store"},
    "rollout": UPWARDS | {"train", "prune", "distill", "quant", "export", "report"},
    "bundle": {"cli", "stages", "train", "prune", "distill", "quant"},
    "search": {"cli", "stages", "train", "prune", "distill", "quant", "export"},
    "pipeline": {"cli", "search"},
    "status": {"cli", "pipeline", "stages"},
    "preflight": {"cli", "pipeline", "status"},
    "chain": UPWARDS - {"chain"},
    "stages": UPWARDS - {"stages"},
}
# The protocol of hooks, which methods implement; the tables of their criteria and losses, which the recipe offers.
ANYWHERE = {"yolo_compress.train.hook", "yolo_compress.recipe.choices"}
STANDARD = set(sys.stdlib_module_names)
RUNTIME_THIRD_PARTIES = {
    "numpy", "cv2", "PIL", "ai_edge_litert", "coremltools", "flatbuffers", "ncnn", "onnx", "onnxruntime", "openvino", "tensorrt",
    "cuda", "pycuda", "cryptography",
}  # fmt: skip
ROS = {"rclpy", "sensor_msgs", "vision_msgs"}  # from the robot's installation, only for the ROS 2 node


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imports(file: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the absolute dotted names of all imports in the file, with their statements. `from a import b` is a.b."""
    here = ["yolo_compress", *file.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []  # __init__ counts as a module of its folder
            whole = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield ".".join([*whole, alias.name]), node


def own(name: str) -> str | None:
    """Return the part of the package that an import names (`prune`, `recipe`, ...); None for other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "yolo_compress" and len(parts) > 1 else None


def test_imports_finds_every_form() -> None:
    found = {name for name, _ in imports(PACKAGE / "runtime/backends/tensorrt/build.py")}
    assert {
        "yolo_compress.runtime.backends.tensorrt.library.library",
        "yolo_compress.runtime.errors.EngineError",
    } <= found
    assert "ultralytics.utils.metrics.box_iou" in {
        name for name, _ in imports(PACKAGE / "evaluate" / "ultralytics_ap.py")
    }
    assert len(FILES) > 50


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_only_where_allowed(library: str) -> None:
    through = {name_of(file) for file in FILES for name, _ in imports(file) if name.split(".")[0] == library}
    allowed = DOORS[library]
    strangers = {
        file
        for file in through
        if not any(file == door or (door[-1] == "/" and file.startswith(door)) for door in allowed)
    }
    assert not strangers, f"{library} is imported by {sorted(strangers)}, but only {sorted(allowed)} may import it"
    assert through, f"{library} is imported nowhere: delete its row"


def test_nets_imports_only_ultralytics_nn_modules() -> None:
    files = (PACKAGE / "nets").glob("*.py")
    seen = {name for file in files for name, _ in imports(file) if name.startswith("ultralytics")}
    assert seen and all(name.startswith("ultralytics.nn.modules.") for name in seen)


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_no_layer_imports_a_higher_one(layer: str) -> None:
    files = [file for file in FILES if name_of(file) == f"{layer}.py" or name_of(file).startswith(f"{layer}/")]
    assert files
    wrong = {
        f"{name_of(file)}: {name}"
        for file in files
        for name, _ in imports(file)
        if own(name) in FORBIDDEN[layer] and not any(name.startswith(one) for one in ANYWHERE)
    }
    assert not wrong


@pytest.mark.parametrize("layer", ["prune", "distill", "quant"])
def test_methods_do_not_import_other_methods(layer: str) -> None:
    others = {"prune", "distill", "quant"} - {layer}
    files = (PACKAGE / layer).rglob("*.py")
    assert not {f"{name_of(file)}: {name}" for file in files for name, _ in imports(file) if own(name) in others}


def test_any_module_may_be_imported_first() -> None:
    """Users may import surgery before the rest of the package."""
    code = "import yolo_compress.prune.graph, os; assert os.environ['ULTRALYTICS_SAFE_LOAD'] == '1'; import yolo_compress.train"
    environment = {key: value for key, value in os.environ.items() if key != "ULTRALYTICS_SAFE_LOAD"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the circular imports of a graph, each as the list of its names."""
    reach = {name: set(near) for name, near in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return [
        sorted(group)
        for group in {frozenset(n for n in reach[name] if name in reach.get(n, ())) for name in graph}
        if group
    ]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_there_are_no_circular_imports() -> None:
    modules = {"yolo_compress." + name_of(file).removesuffix(".py").replace("/", "."): file for file in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    parts: dict[str, set[str]] = {}
    for module, file in modules.items():
        named = {name if name in modules else name.rpartition(".")[0] for name, _ in imports(file)}
        graph[module] = {name for name in named & set(modules) if name != module}
        part = own(module)
        if part is not None:  # the package's __init__ imports its public names
            parts.setdefault(part, set()).update(
                other for name in graph[module] if (other := own(name)) not in (part, None)
            )
    assert circles(graph) == []
    assert circles({part: near & set(parts) for part, near in parts.items()}) == []


def test_only_the_run_and_the_preflight_import_stages() -> None:
    wrong = {
        name_of(file)
        for file in FILES
        for name, _ in imports(file)
        if own(name) == "stages" and not name_of(file).startswith("stages/")
    }
    assert wrong <= {"pipeline.py", "preflight.py"}


@pytest.mark.parametrize("file", sorted((PACKAGE / "runtime").rglob("*.py")), ids=lambda file: file.name)
def test_runtime_is_python_38_and_on_its_own(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 8))
    for name, node in imports(file):
        if own(name):
            assert own(name) == "runtime", f"{name}: nothing else of the package"
            assert isinstance(node, ast.ImportFrom) and node.level >= 1, (
                f"{name}: relative, so that the folder can be copied"
            )
        else:
            assert name.split(".")[0] in STANDARD | RUNTIME_THIRD_PARTIES | ROS, name
    top = {name.split(".")[0] for node in tree.body for name, at in imports(file) if at is node and not own(name)}
    assert top <= STANDARD | {"numpy"}, "cv2, Pillow and engine libraries are imported when they are needed"
    assert newer_than_38(tree) == set()


def newer_than_38(tree: ast.Module) -> set[str]:
    """Return what Python 3.8 parses but cannot run: built-in generics and `X | Y` outside annotations, newer methods."""
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part is not None
        for inner in ast.walk(part)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in annotations:  # strings, under `from __future__ import annotations`
            continue
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and node.value.id in {"list", "dict", "tuple", "set"}
        ):
            found.add(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Attribute) and node.attr in {
            "removeprefix",
            "removesuffix",
            "is_relative_to",
            "bit_count",
            "pairwise",
        }:
            found.add(f"line {node.lineno}: .{node.attr}")
        if isinstance(node, ast.keyword) and node.arg in {"strict", "slots", "kw_only"}:
            found.add(f"line {node.value.lineno}: {node.arg}=")
    return found


def test_newer_than_38_finds_every_form() -> None:
    text = "x = list[int]()\ny = 'a'.removeprefix('a')\nz = zip(x, y, strict=True)\ndef f(a: list[int]) -> dict[str, int]: ..."
    assert len(newer_than_38(ast.parse(text))) == 3
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case 1: pass", feature_version=(3, 8))


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules of a new interpreter after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


HEAVY = {"torch", "ultralytics", "cv2", "onnx", "onnxruntime", "openvino", "modelopt", "pycocotools"}


@pytest.mark.parametrize(
    "statement", ["import yolo_compress", "import yolo_compress.cli.main", "from yolo_compress import load"]
)
def test_the_package_and_its_command_line_import_no_heavy_library(statement: str) -> None:
    assert not imported_by(statement) & HEAVY


def test_the_runtime_imports_no_library_but_numpy() -> None:
    folder = PACKAGE / "runtime"
    modules = [".".join(file.relative_to(folder).with_suffix("").parts) for file in sorted(folder.rglob("*.py"))]
    modules = [name for name in modules if "__init__" not in name and "ros2" not in name]
    statement = "import " + ", ".join(f"yolo_compress.runtime.{name}" for name in modules)
    assert not imported_by(statement) & (HEAVY | {"PIL", "tensorrt", "pydantic", "yaml"})
