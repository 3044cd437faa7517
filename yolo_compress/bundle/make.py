"""`yolo-compress bundle`: make one folder or tar for the robot. The compressed model of the recipe must have passed its gate."""

from __future__ import annotations

import gzip
import secrets
import shutil
import tarfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from yolo_compress import home, pipeline, progress, runtime
from yolo_compress.bundle import cascade_files, golden
from yolo_compress.bundle.io_contract import check_signatures
from yolo_compress.bundle.keys import read_seed
from yolo_compress.bundle.launchers import launcher
from yolo_compress.bundle.targets import registry
from yolo_compress.chain import current, plan
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import GateFailed, Locked, RecipeError, StorageError
from yolo_compress.evaluate.rows import bench_rows
from yolo_compress.export.nms import NMS_SUFFIX
from yolo_compress.files.atomic import TEMPORARY, fsync_directory, fsync_file, replace, storage_errors
from yolo_compress.files.lock import lock
from yolo_compress.preflight import prepare
from yolo_compress.recipe.messages import got
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.runtime.measure.golden import FOLDER as GOLDEN
from yolo_compress.runtime.measure.groundtruth import image_set
from yolo_compress.runtime.registry import RUNTIMES
from yolo_compress.runtime.secure.signed_manifest import About, Manifest, seal
from yolo_compress.store import environment
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store

PARTIAL = f"{TEMPORARY}bundle-"  # prefix of the temporary folder of a bundle, next to `out`
LOCK = "lock"  # file in that folder, locked while a process works there
COMMANDS = ("build", "bench", "detect", "switch")
PACKAGES = "coreml.py"  # checks the packages that `export.coreml` writes, and goes into their folder alone
README = """{name}, version {version}, for {target}: YOLO detector, {classes} classes, {width}x{height} px.

Python 3.8 or newer, numpy, and one of: {needs}.
Image files need opencv-python or pillow, videos and cameras opencv-python. Nothing here uses the network.

  python3 build.py                     builds engines/ on this machine (--precision int8, --runtime ..., --workspace-mib N)
  python3 bench.py                     golden self-test, latency, throughput, memory, power -> device.json
  python3 bench.py --data FOLDER       and mAP over FOLDER/images with FOLDER/labels; --coco FILE for a COCO json
  python3 detect.py SOURCE             image, folder, video, camera number or golden/0.npy: a JSON line an image; --draw, --shadow
  python3 switch.py install BUNDLE     the next bundle into the idle slot, tested there, then used; also status, rollback
  python3 ros2_node.py                 ROS 2 (Humble or later): sensor_msgs/Image in, vision_msgs/Detection2DArray out

On the workstation, `yolo-compress report recipe=... add=device.json` puts device.json into the report.

manifest.json has the sha256 of every file. A bundle with a file changed, missing or added is refused. Pin a public key
(/etc/yolo_compress/bundle.pub, or the file named by $YOLO_COMPRESS_KEY): then only bundles signed with its private key
are accepted, and only engines that build.py built here.

runtime/ is yolo_compress/runtime of the version in manifest.json (made_with), licence AGPL-3.0.
"""
CASCADE_README = """
cascade/ is a cascade of two models: the large one runs only for images that the small one is expected to fail in. build.py builds it
as engines/RUNTIME-cascade, and detect.py uses it unless --engine names another engine. Its p99 is about the sum of both models.
"""


@dataclass(frozen=True)
class Order:
    """Options of the command `yolo-compress bundle`.

    Attributes:
        out: Folder, or a file that ends in .tar or .tar.gz. It must not exist.
        target: Key of `registry.TARGETS`.
        version: Version of the bundle. Each new bundle needs a higher version.
        seed: Private key. None: do not sign the bundle.
        golden: Number of golden images for the self-test.
        force: Make a bundle even if the gate failed. The manifest says that it was forced.
        cascade: Cascade that the bundle gets. None: none.
    """

    out: Path
    target: str
    version: int
    seed: bytes | None
    golden: int
    force: bool
    cascade: cascade_files.Given | None = None


def order(options: Mapping[str, str]) -> Order:
    """Read the options of the command line.

    Raises:
        RecipeError: A value is invalid, or `out` exists already.
        GateFailed: The cascade is not recommended, and `force` is not set.
        EngineError, CorruptArtifact: The files of the cascade are damaged.
    """
    out, target = Path(options["out"]), options.get("target", "plain")
    if out.exists() or out.is_symlink():
        raise RecipeError(f"out={out}: exists already; give another name, or delete it first")
    if target not in registry.TARGETS:
        raise RecipeError(f"command line: target: got {got(target)}, expected {', '.join(registry.TARGETS)}")
    force = options.get("force") == "true"
    cascade = cascade_files.given(Path(options["cascade"])) if "cascade" in options else None
    if cascade is not None:
        if target != "plain":
            raise RecipeError(f"command line: cascade: works with target=plain only; {target} runs one model")
        cascade_files.check_verdict(cascade, force)
    return Order(
        out,
        target,
        _count(options, "version", int(time.time())),
        read_seed(Path(options["key"])) if "key" in options else None,
        _count(options, "golden", 4),
        force,
        cascade,
    )


def _count(options: Mapping[str, str], key: str, default: int) -> int:
    text = options.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) < 2**53):
        raise RecipeError(f"command line: {key}: got {got(text)}, expected a whole number >= 1")
    return int(text)


class Made(TypedDict):
    """The JSON document that `yolo-compress bundle` prints."""

    bundle: str  # path of the bundle
    name: str  # name of the recipe
    version: int
    target: str
    signed: bool
    gate: Mapping[str, object]  # result of the gate, as in the manifest
    size_mib: float
    files: int  # number of files that the manifest lists


def make(recipe: Recipe, asked: Order, *, store: Store | None = None, wait: bool = True) -> Made:
    """Run the stages of the recipe that are not up to date, check the gate, and write the bundle.

    The bundle is written under a temporary name and then renamed.

    Args:
        recipe: Recipe of the compressed model.
        asked: Options of the command.
        store: Store of the artefacts. None: the default store.
        wait: Whether to wait if another process holds the lock of the store. False: raise `Locked`.

    Raises:
        GateFailed: The gate failed, and `force` is not set. Nothing is written.
        CompressError: A stage failed, or the model does not fit the target.
    """
    store = store or Store(home.weights())
    report = pipeline.run(recipe, "report", store=store, wait=wait)
    recipe, dataset = prepare(recipe, store)
    planned = plan(recipe, dataset, "report")
    artifacts = current(store, planned)
    for stage in ("export", "engine"):
        store.verify(artifacts[stage])
    gate = _gate(report, asked)
    sources = cascade_files.find(asked.cascade, store, artifacts["export"], dataset) if asked.cascade else None
    _sweep(asked.out.parent)
    partial = asked.out.parent / f"{PARTIAL}{secrets.token_hex(4)}-{asked.out.name[-40:]}"
    try:
        with storage_errors(asked.out):
            root = partial / asked.out.name.removesuffix(".gz").removesuffix(".tar")
            root.mkdir(parents=True)
        with _marked(partial), storage_errors(asked.out):
            manifest = _fill(root, recipe, dataset, artifacts, gate, asked, sources)
            size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
            _publish(root, partial, asked.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "bundle": str(asked.out),
        "name": manifest["name"],
        "version": manifest["version"],
        "target": asked.target,
        "signed": asked.seed is not None,
        "gate": gate,
        "size_mib": round(size / 2**20, 2),
        "files": len(manifest["files"]),
    }


def _marked(partial: Path) -> AbstractContextManager[None]:
    """Lock the temporary folder of a bundle, so that no other call removes it."""
    return lock(partial / LOCK, "bundle", wait=False)


def _sweep(folder: Path) -> None:
    """Remove temporary folders that killed processes left. No process holds the lock of such a folder."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.is_dir() and not left.is_symlink():
            with suppress(Locked, StorageError):  # another call uses it, or it belongs to another user
                with _marked(left):
                    pass
                shutil.rmtree(left, ignore_errors=True)


def _gate(report: Artifact, asked: Order) -> dict[str, object]:
    """Return the result of the gate from the report, as the manifest states it.

    Raises:
        GateFailed: The gate failed, and the bundle is not forced.
    """
    found = report.metrics["gate"]
    passed = bool(found["passed"])
    if not passed:
        line = report.metrics["verdict"]["line"]
        if not asked.force:
            raise GateFailed(f"{line}; no bundle is made (force=true makes one that is marked as forced)")
        progress.notice(f"forced: {line}")
    rows = ("judged", "reference", "worst")  # ids of rows of the report, which is not in the bundle
    kept = {key: value for key, value in found.items() if key not in rows}
    if passed and asked.cascade is not None and not asked.cascade.recommended:
        kept = {**kept, "passed": False, "reason": asked.cascade.document["verdict"]["line"]}
    return {"forced": not kept["passed"], **kept}


def _fill(
    root: Path,
    recipe: Recipe,
    dataset: Dataset,
    artifacts: Mapping[str, Artifact],
    gate: Mapping[str, object],
    asked: Order,
    sources: tuple[cascade_files.Source, cascade_files.Source] | None,
) -> Manifest:
    """Write all files of the bundle into `root`, the manifest last. Return the manifest."""
    onnx = _networks(root, artifacts["export"])
    height, width = recipe.data.imgsz_hw
    check_signatures([root / file for file in onnx.values()], (height, width), len(dataset.names), dataset.channels)
    code(root)
    (root / "labels.txt").write_text("".join(f"{name}\n" for name in dataset.names), encoding="utf-8")
    progress.say(f"bundle: computing the detections of every engine here in {asked.golden} golden images")
    about: About = {
        "name": recipe.name,
        "target": asked.target,
        "names": list(dataset.names),
        "imgsz": [height, width],
        "max_det": recipe.data.max_det,
        "onnx": onnx,
        "gate": dict(gate),
        "fastest": _fastest(artifacts["bench"]),
        "golden": golden.write(root / GOLDEN, dataset, artifacts["export"], artifacts["engine"], asked.golden),
        "val": {
            "digest": dataset.val_digest,
            "content": image_set([(one.sha256, one.boxes) for one in dataset.val], dataset.names),
            "images": len(dataset.val),
        },
        "made_with": {
            key: value for key, value in environment.describe().items() if key in ("commit", "packages", "python")
        },
        "recipe_fingerprint": artifacts["report"].fingerprint,
    }
    if asked.cascade is not None and sources is not None:
        about["cascade"] = cascade_files.add(
            root, asked.cascade, sources, onnx, dataset, artifacts["engine"], asked.golden
        )
    registry.write(asked.target, root, {**about, "version": asked.version})
    text = README.format(
        needs=", or ".join(row.needs for row in reversed(RUNTIMES.values())),
        classes=len(dataset.names),
        height=height,
        width=width,
        name=recipe.name,
        version=asked.version,
        target=asked.target,
    )
    (root / "README.txt").write_text(text + (CASCADE_README if asked.cascade else ""), encoding="utf-8")
    return seal(root, about, asked.version, asked.seed)


def _fastest(bench: Artifact) -> list[str]:
    """Return the engines of the compressed model ("openvino-int8"), the fastest first."""
    timed = [
        (row["latency_p50_ms"], f"{row['runtime']}-{row['precision']}")
        for row in bench_rows(bench)
        if row["status"] == "ok" and row["model"] == "compressed" and row["runtime"] in RUNTIMES
    ]
    return [name for ms, name in sorted((ms, name) for ms, name in timed if ms is not None)]


def _networks(root: Path, export: Artifact) -> dict[str, str]:
    """Copy all ONNX files of the compressed model into the bundle, and the calibration cache if there is one.

    Returns:
        A dict from stem (name without `.onnx`) to file, for the ONNX files that build.py builds engines from.
    """
    (root / "onnx").mkdir()
    found = {}
    for name in sorted(export.manifest.files):
        file = Path(name)
        if file.parts[0] == "compressed" and file.suffix in (".onnx", ".cache"):
            shutil.copyfile(export.file(name), root / "onnx" / file.name)
            # build.py does not use the file for the calibration cache, nor those with NMS for other decoders
            by_hand = file.stem == "int8-implicit" or file.stem.endswith(NMS_SUFFIX)
            if file.suffix == ".onnx" and not by_hand:
                found[file.stem] = f"onnx/{file.name}"
    return found


def code(root: Path) -> None:
    """Write the folder `runtime/` and the commands that start its modules into the bundle."""
    source = Path(str(runtime.__file__)).parent
    shutil.copytree(source, root / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "runtime" / "commands" / PACKAGES).unlink()
    for command in COMMANDS:
        (root / f"{command}.py").write_text(launcher(command), encoding="utf-8")


def _publish(root: Path, partial: Path, out: Path) -> None:
    """Write everything to the disk, then rename the bundle to `out` in one step."""
    if not out.name.endswith((".tar", ".tar.gz")):
        for file in sorted(root.rglob("*")):
            if file.is_file():
                fsync_file(file)
            else:
                fsync_directory(file)
        replace(root, out)
        return
    archive = partial / "archive"
    with ExitStack() as stack:
        stream: Any = stack.enter_context(open(archive, "wb"))
        if out.name.endswith(".gz"):  # tarfile's own gzip has the file's name and the time in its header
            stream = stack.enter_context(gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0))
        with tarfile.open(fileobj=stream, mode="w") as tar:
            tar.add(root, root.name, filter=_plain)
    fsync_file(archive)
    replace(archive, out)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove user, mode and time from a tar member, so that equal bundles give equal tars."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member
