"""The doors: every kind of input that a user, another program or another machine can give, with valid ones to alter."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from tests.fuzz.mutate import altered, json_bytes, json_lines, other_values
from tests.fuzz.run import Call, Door
from tests.support import lint_graphs, report_case
from tests.support.noise_set import noise_set
from yolo_compress.cli import main, rollout, verbs
from yolo_compress.data import cache as filecache
from yolo_compress.data import data_yaml as datayaml
from yolo_compress.data import dataset
from yolo_compress.data import shipped as datasets
from yolo_compress.errors import CompressError, EnvironmentLacks
from yolo_compress.export.calibration_cache import read_cache
from yolo_compress.files import strict_yaml
from yolo_compress.lint import check, isolated
from yolo_compress.lint.targets import TARGETS
from yolo_compress.prune.latency import read_table
from yolo_compress.quant.ranges import QuantState
from yolo_compress.recipe import recipe
from yolo_compress.report import as_text, devices
from yolo_compress.report.charts.scatter import accuracy_over_latency
from yolo_compress.runtime.backends import onnx_metadata
from yolo_compress.runtime.backends.base import EngineInfo, load_info
from yolo_compress.runtime.commands.bundle import open_bundle
from yolo_compress.runtime.commands.command_line import run_command
from yolo_compress.runtime.detect import sources
from yolo_compress.runtime.detect.cascade import FEATURES, read_policy
from yolo_compress.runtime.detect.pre import UnreadableImage
from yolo_compress.runtime.errors import RuntimeFailure
from yolo_compress.runtime.measure import golden, groundtruth, layer_times
from yolo_compress.runtime.secure.signed_manifest import seal
from yolo_compress.runtime.secure.slots import Slots
from yolo_compress.store import fingerprint
from yolo_compress.store.manifest import read_artifact, verify_payload
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint as train_checkpoint
from yolo_compress.train.checkpoint import dress

Made = tuple[SearchStrategy[Any], Call, Any]  # cases, what is called with each, and a case that is sound

# --- the command line -------------------------------------------------------------------------------------------------

WORDS = (
    "", "0", "-1", "1e400", "nan", "null", "true", "9" * 30, "9" * 5000, "5%", "图", "a b", "--", "-h", "=", "a=b", "--x", "\udc80",
    "\0", "x\ny", "\x1b[2J", "gone", "gone.yaml", "gone/x.pt", "/", ".", "..", "/dev/null", "a.yaml", "b.json", "c.pt", "d.onnx",
    "e.txt", "folder", "link", "x" * 300, "[", "[1,2]", "{a: 1}", "'", "fp32", "cpu", "tensorrt", "problems:1", "frames:nan",
    "[[[[[[[[[[[[[[[[[[[[", "bench:x", "weights/x/bench:y",
)  # fmt: skip
STOPPED = "digits cannot be drawn here"  # where a command would begin to work


@st.composite
def _command(draw: st.DrawFn) -> list[str]:
    verb = draw(st.sampled_from([*verbs.VERBS, "nonsense", ""]))
    knobs = [*recipe.options(), *recipe.SECTIONS, *verbs.options()]
    own = [option.name for option in verbs.VERBS[verb].options] if verb in verbs.VERBS else ["x"]
    word = st.sampled_from(WORDS) | st.text(max_size=4)
    names = st.sampled_from(own) if own else st.sampled_from(knobs)
    value = word | st.sampled_from([*recipe.names(), *TARGETS])
    pair = st.tuples(names | st.sampled_from(knobs), value)
    form = st.sampled_from(("{}={}", "--{}={}", "--{}"))
    said = st.lists(st.tuples(form, pair), max_size=2) | st.lists(st.tuples(form, pair) | word, max_size=5)
    words = [one if isinstance(one, str) else one[0].format(*one[1]) for one in draw(said)]
    if verb in verbs.VERBS and verbs.VERBS[verb].words:
        words.append(draw(word))
    needs = [option.name for option in verbs.VERBS[verb].options if option.needed] if verb in verbs.VERBS else []
    needed = [f"{name}={draw(value)}" for name in needs if draw(st.integers(0, 3))]
    return [verb, *draw(st.permutations([*needed, *words]))]


def command_line(folder: Path) -> Made:
    """Every verb; nothing is downloaded, and what would draw digits or train stops before it."""
    noise_set(folder / "folder", 2, 1)
    for name, content in {
        "a.yaml": b"data: {yaml: gone}\n", "b.json": b"{}", "c.pt": b"PK", "d.onnx": b"\x08", "e.txt": b"x",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("link")

    def stopped(*_: Any, **__: Any) -> None:
        raise EnvironmentLacks(STOPPED)

    def here(file: Path, target: str) -> tuple[str, dict[str, Any]]:
        report = check.check(file, target)
        return report.text(), report.as_json()

    def call(words: list[str]) -> int:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, {"YOLO_COMPRESS_HOME": str(folder / "home")}))
            stack.enter_context(mock.patch.object(datasets, "draw_digits", stopped))
            stack.enter_context(mock.patch("yolo_compress.train.trainer.train", stopped))
            stack.enter_context(mock.patch("yolo_compress.cli.fetch.fetch", stopped))
            stack.enter_context(mock.patch.object(isolated, "check_isolated", here))
            os.chdir(folder)
            return main.main(words)

    return _command(), call, ["cfg", "recipe=digits"]


# --- text files of the user -------------------------------------------------------------------------------------------


def recipe_yaml(folder: Path) -> Made:
    """What is read is written and read back equal."""
    shipped = [(Path(recipe.__file__).parent / f"shipped/{name}.yaml").read_bytes() for name in recipe.names()]
    whole = [strict_yaml.parse(text.decode(), "x").data for text in shipped]
    whole = [{**tree, "data": {**(tree.get("data") or {}), "yaml": "x.yaml"}} for tree in whole]
    file = folder / "r.yaml"

    def call(content: bytes) -> None:
        file.write_bytes(content)
        found = recipe.load(str(file))
        file.write_text(found.dump(), encoding="utf-8")
        assert recipe.load(str(file)) == found

    return altered(shipped) | json_bytes(*whole), call, json.dumps(whole[0]).encode()


def _set(folder: Path) -> Path:
    return noise_set(folder, 3, 2)


def _load_set(file: Path) -> None:
    with mock.patch.object(datayaml, "MAX_FOLDERS", 30):  # an altered `train:` may be /
        dataset.load(str(file), on_bad="skip", max_unlabelled=1.0)


def data_yaml(folder: Path) -> Made:
    file = _set(folder)
    trees = [
        {"train": "images/train", "val": "images/val", "names": ["bolt", "nut"]},
        {
            "path": str(folder),
            "train": ["images/train", "list.txt"],
            "val": "images/val",
            "names": {0: "a", 1: "b"},
            "nc": 2,
        },
        {
            "path": ".",
            "train": "images/train",
            "validation": "images/val",
            "nc": 2,
            "channels": 3,
            "kpt_shape": [17, 3],
        },
    ]
    (folder / "list.txt").write_text("./images/train/0.png\n")
    texts = [strict_yaml.dump(tree).encode() for tree in trees]

    def call(content: bytes) -> None:
        file.write_bytes(content)
        _load_set(file)

    return altered(texts) | json_bytes(*trees), call, texts[1]


def label_file(folder: Path) -> Made:
    file = _set(folder)
    samples = [
        b"0 0.5 0.5 0.4 0.4\n1 0.25 0.25 0.1 0.1\n",
        b"1 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\r\n",
        b"0 0.5 0.5 0.4 0.4 " + b"0.5 " * 12,
        b"",
    ]
    texts = {"box": file.read_text(), "pose": file.read_text() + "kpt_shape: [4, 3]\n"}

    def call(case: tuple[bytes, str]) -> None:
        file.write_text(texts[case[1]])
        (folder / "labels/train/0.txt").write_bytes(case[0])
        _load_set(file)

    return st.tuples(altered(samples), st.sampled_from(sorted(texts))), call, (samples[0], "pose")


def list_file(folder: Path) -> Made:
    file = _set(folder)
    file.write_text(file.read_text().replace("train: images/train", "train: list.txt"))
    samples = [
        b"./images/train/0.png\nimages/train/1.png\n",
        f"{folder}/images/train/0.png\r\n\r\n{folder}/images/train/2.png".encode(),
        b"images/train/../train/0.png\nimages/val/0.png\n",
    ]

    def call(content: bytes) -> None:
        (folder / "list.txt").write_bytes(content)
        _load_set(file)

    return altered(samples), call, samples[0]


def image_file(folder: Path) -> Made:
    """By the preflight of a data set, and by the robot's reader."""
    file = _set(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 4), np.uint8)
    samples = {}
    for kind, mode, options in (
        ("png", "RGB", {}), ("png", "P", {}), ("jpg", "RGB", {}), ("jpg", "CMYK", {}), ("bmp", "RGB", {}), ("webp", "RGBA", {}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}), ("tiff", "L", {}), ("jp2", "RGB", {}), ("gif", "P", {}),
        ("jpg", "L", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        image = Image.fromarray(pixels, mode) if mode in ("RGBA", "CMYK") else Image.fromarray(pixels[..., :3])
        image.convert(mode).save(buffer, {"jpg": "jpeg", "jp2": "jpeg2000"}.get(kind, kind), **options)
        samples.setdefault(kind, []).append(buffer.getvalue())
    kinds = st.sampled_from(sorted(samples))
    cases = st.tuples(kinds, altered([one for each in samples.values() for one in each]))
    place = folder / "images/train/0"

    def call(case: tuple[str, bytes]) -> None:
        path = place.with_suffix(f".{case[0]}")
        path.write_bytes(case[1])
        try:
            _load_set(file)
            with contextlib.suppress(UnreadableImage):  # predict counts it and goes on
                for picture in sources.open_source(path).images:
                    assert picture.read().dtype == np.uint8
        finally:
            path.unlink()

    place.with_suffix(".png").unlink()
    return cases, call, ("png", samples["png"][0])


# --- models -----------------------------------------------------------------------------------------------------------


def _tiny() -> Any:
    torch.manual_seed(0)
    config = yaml_model_load("yolov8n.yaml")
    config["scales"]["n"] = [0.01, 0.01, 64]
    return dress(DetectionModel(config, nc=2, verbose=False), ["bolt", "nut"])


def checkpoint(folder: Path) -> Made:
    """The archive altered, and the program in it, put back with a sound checksum."""
    file = folder / "m.pt"
    train_checkpoint.save_model(_tiny(), file)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    program = next(name for name in members if name.endswith("data.pkl"))

    def packed(content: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, content if name == program else member)
        return buffer.getvalue()

    def call(content: bytes) -> None:
        file.write_bytes(content)
        train_checkpoint.load_model(file)

    return altered([whole]) | altered([members[program]]).map(packed), call, packed(members[program])


def onnx_file(folder: Path) -> Made:
    """By lint, for any target that is no library, and by the robot's reader of metadata."""
    nets = [lint_graphs.Net(), lint_graphs.Net(13), lint_graphs.Net(19)]
    nets[0].head(nets[0].stem())
    nets[1].head(nets[1].op("Add", [nets[1].conv("images", "a", into=3), nets[1].conv("images", "b", into=3)], "sum"))
    nets[2].head(nets[2].int8_conv(nets[2].pair(nets[2].stem(), [0.1] * 32), "c"))
    models = [net.model() for net in nets]
    for model in models:
        for name, text in (("names", "{0: 'bolt', 1: 'nut'}"), ("imgsz", "[32, 32]")):
            model.metadata_props.add(key=name, value=text)
    file = folder / "m.onnx"
    targets = sorted(set(TARGETS) - set(isolated.COMPILER))

    def call(case: tuple[bytes, str]) -> None:
        file.write_bytes(case[0])
        with contextlib.suppress(RuntimeFailure):
            onnx_metadata.names_and_imgsz(file)
        report = check.check(file, case[1])
        json.dumps(report.as_json(), allow_nan=False)
        report.text()

    texts = [model.SerializeToString() for model in models]
    return st.tuples(altered(texts), st.sampled_from(targets)), call, (texts[0], targets[0])


# --- what our own commands wrote --------------------------------------------------------------------------------------


def artefact_manifest(folder: Path) -> Made:
    """Also with a checksum and a fingerprint that fit."""
    store, own = Store(folder), {"stage": "prune", "version": 1, "config": {"epochs": 1}, "inputs": {}}
    (store.partial("prune", fingerprint.fingerprint(own)) / "model.pt").write_bytes(b"weights")
    made = store.publish("prune", fingerprint.fingerprint(own), own, {"map50_95": 0.5}, {"torch": "2"}, 1.5)
    file = made.path / "manifest.json"
    tree = json.loads(file.read_text())

    def sealed(tree: Any) -> bytes:
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            tree.pop("checksum", None)
            if isinstance(tree.get("key"), dict):
                tree["fingerprint"] = fingerprint.fingerprint(tree["key"])
            tree["checksum"] = hashlib.sha256(fingerprint.canonical(tree).encode()).hexdigest()
        return json.dumps(tree).encode()

    def call(content: bytes) -> None:
        file.chmod(0o644)
        file.write_bytes(content)
        found = read_artifact(made.path, "prune")
        verify_payload(found, {"model.pt"})
        assert found.manifest.content

    return altered([file.read_bytes()]) | other_values([tree]).map(sealed), call, sealed(tree)


def engine_sidecar(folder: Path) -> Made:
    (folder / "model.bin").write_bytes(b"engine")
    tree = {
        "runtime": "onnxruntime", "precision": "int8", "imgsz": [64, 96], "names": ["bolt", "nut"], "onnx_sha256": "a1" * 32,
        "library": "1.20", "files": {"model.bin": {"sha256": hashlib.sha256(b"engine").hexdigest(), "size": 6}},
        "built_on": {"cpu": "x"}, "options": {}, "schema": 1,
    }  # fmt: skip

    def call(content: bytes) -> None:
        (folder / "engine.json").write_bytes(content)
        load_info(folder)

    return json_bytes(tree), call, json.dumps(tree).encode()


def policy_json(folder: Path) -> Made:
    part = {"onnx_sha256": "a1" * 32, "precision": "int8", "imgsz": [64, 96]}
    tree = {
        "schema": 1, "small": {"folder": "small", **part}, "large": {"folder": "large", **part}, "names": ["bolt", "nut"],
        "features": list(FEATURES), "weights": [0.1] * len(FEATURES), "bias": 0.0, "threshold": 0.01,
    }  # fmt: skip

    def call(content: bytes) -> None:
        (folder / "policy.json").write_bytes(content)
        read_policy(folder).hands_over(np.array([[1, 2, 30, 40, 0.9, 0]], np.float32), 64, 96)

    return json_bytes(tree), call, json.dumps(tree).encode()


def _bundle(folder: Path) -> tuple[Path, dict[str, Any]]:
    root = folder / "bundle"
    (root / "onnx").mkdir(parents=True)
    (root / "onnx/fp32.onnx").write_bytes(b"onnx")
    (root / golden.FOLDER).mkdir()
    for number in range(2):
        np.save(root / golden.FOLDER / f"{number}.npy", np.full((8, 9, 3), number, np.uint8))
    about = {
        "name": "tiny",
        "target": "plain",
        "names": ["bolt"],
        "imgsz": [64, 96],
        "onnx": {"fp32": "onnx/fp32.onnx"},
    }
    return root, seal(root, {**about, "gate": {"passed": True}, "max_det": 300}, 3, None)


def bundle_manifest(folder: Path) -> Made:
    root, tree = _bundle(folder)

    def call(content: bytes) -> int:
        (root / "manifest.json").write_bytes(content)
        return run_command(lambda: bool(open_bundle(root).about()) - 1)

    return json_bytes(tree), call, json.dumps(tree).encode()


def slot_mark(folder: Path) -> Made:
    """The robot's slots: the mark of the one that runs, and the newest version."""
    (folder / "slots/a").mkdir(parents=True)
    (folder / "current").symlink_to("slots/a")
    mark, state = {"version": 3, "manifest_sha256": "a1" * 32, "name": "tiny"}, {"schema": 1, "newest": 3}

    def call(case: tuple[bytes, bytes]) -> int:
        (folder / "slots/a.json").write_bytes(case[0])
        (folder / "state.json").write_bytes(case[1])
        slots = Slots(folder)
        return run_command(lambda: len(f"{slots.product()}{slots.newest()}") and 0)

    return st.tuples(json_bytes(mark), json_bytes(state)), call, (json.dumps(mark).encode(), json.dumps(state).encode())


class _Backend:
    """An engine that finds one object in each image."""

    needs_nms = True

    precision, executed, names, imgsz, batch, channels = "fp32", "fp32", ("bolt",), (32, 32), 1, 3

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        return np.array([[[16.0], [16.0], [8.0], [8.0], [0.9]]], np.float32).repeat(len(images_BCHW), 0)


GOLDEN = {
    "schema": 1, "conf": 0.25, "floor": 0.1, "iou": 0.7, "images": [{"file": "0.npy", "name": "a"}, {"file": "1.npy", "name": "b"}],
    "engines": {"onnxruntime-fp32": {"executed": "fp32", "library": "1", "onnx_sha256": "ab"}},
    "tolerances": {"same": {"of": "worst", "box_px": 1, "score": 0.1, "unmatched": 0},
                   "fp32": {"of": "most", "box_px": 1, "score": 0.1, "unmatched": 0}},
    "expected": {"onnxruntime-fp32": [[[1, 2, 3, 4, 0.9, 0]], []]},
}  # fmt: skip


INFO = EngineInfo("onnxruntime", "fp32", (8, 8), ("a",), "ab", "1")


def golden_json(folder: Path) -> Made:
    root, _ = _bundle(folder)

    def call(content: bytes) -> int:
        (root / golden.FOLDER / golden.FILE).write_bytes(content)
        return run_command(lambda: bool(golden.check(root, _Backend(), INFO)) - 1)  # type: ignore[arg-type]

    return json_bytes(GOLDEN), call, json.dumps(GOLDEN).encode()


def golden_image(folder: Path) -> Made:
    root, _ = _bundle(folder)
    (root / golden.FOLDER / golden.FILE).write_text(json.dumps(GOLDEN))
    samples = []
    for array in (
        np.zeros((8, 9, 3), np.uint8),
        np.asfortranarray(np.ones((8, 9, 3), np.uint8)),
        np.ones(3),
        np.array(["a"]),
    ):
        buffer = io.BytesIO()
        np.save(buffer, array)
        samples.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    samples.append(buffer.getvalue())

    def call(content: bytes) -> int:
        (root / golden.FOLDER / "0.npy").write_bytes(content)
        return run_command(lambda: bool(golden.check(root, _Backend(), INFO)) - 1)  # type: ignore[arg-type]

    return altered(samples), call, samples[0]


def quant_json(folder: Path) -> Made:
    state = QuantState(
        {"images": 1.0, "model.0": 2.5}, {"model.0.conv": (0.1, 0.2)}, {"model.0.conv": 3.0}, False, "max", 7
    )

    def call(content: bytes) -> None:
        (folder / "quant.json").write_bytes(content)
        found = QuantState.load(folder / "quant.json")
        assert QuantState.from_json(json.loads(found.dumps())) == found

    return json_bytes(state.to_json()), call, state.dumps().encode()


def calibration_cache(folder: Path) -> Made:
    def call(content: bytes) -> None:
        (folder / "c.cache").write_bytes(content)
        assert all(0 < scale < float("inf") for scale in read_cache(folder / "c.cache").values())

    sample = b"TRT-8502-EntropyCalibration2\nimages: 3c010204\nmodel.0/conv: 3f800000\n"
    return altered([sample]), call, sample


def preflight_cache(folder: Path) -> Made:
    """A cache that cannot be used is as good as none."""
    file, cache = _set(folder), folder / "c.cache"
    expected = dataset.load(str(file), cache=cache)
    sample = cache.read_bytes()
    assert len(filecache.FileCache(cache).records)

    def call(content: bytes) -> None:
        cache.write_bytes(content)
        with contextlib.suppress(CompressError):  # a size or a finding that is wrong is one
            assert dataset.load(str(file), cache=cache).names == expected.names

    return altered([sample]), call, sample


# --- what other machines wrote ----------------------------------------------------------------------------------------


def device_json(folder: Path) -> Made:
    """`report add`, up to the texts of the report."""
    document = json.loads(json.dumps(report_case.whole()))
    other = copy.deepcopy(document)
    other["recipe"] = "other"

    def call(content: bytes) -> None:
        (folder / "device.json").write_bytes(content)
        found = devices.add(document, [folder / "device.json"])
        json.dumps(found, allow_nan=False)
        as_text.render_text(found, 120), as_text.render_markdown(found), accuracy_over_latency(found)

    return (
        json_bytes(report_case.device()) | json_bytes(report_case.device(), other),
        call,
        json.dumps(report_case.device()).encode(),
    )


def cascade_json(folder: Path) -> Made:
    document = report_case.whole()

    def call(content: bytes) -> None:
        (folder / "cascade.json").write_bytes(content)
        found = devices.add(document, [folder / "cascade.json"])
        json.dumps(found, allow_nan=False)
        as_text.render_text(found, 120), as_text.render_markdown(found)

    return json_bytes(report_case.cascade()), call, json.dumps(report_case.cascade()).encode()


def _frames(version: int, count: int = 60) -> list[dict[str, Any]]:
    return [
        {"schema": 1, "frame": f"{i}.png", "at": 1e9 + i, "model": {"name": "net", "version": version}, "ms": 10.0 + i % 3,
         "detections": [[10.0, 10.0, 50.0, 60.0, 0.9, 0]], "problem": None}
        for i in range(count)
    ]  # fmt: skip


def _rollout(folder: Path, name: str, strategy: SearchStrategy[bytes], sound: bytes) -> Made:
    """`rollout` with one of its files altered."""
    lines = {"a": _frames(1), "b": _frames(2), "truth": [{"frame": "1.png", "boxes": [[10, 10, 50, 60, 0]]}]}
    for one, entries in lines.items():
        (folder / one).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    options = {one: str(folder / one) for one in (*lines, name)}

    def call(content: bytes) -> None:
        (folder / name).write_bytes(content)
        document = rollout.run(options)
        json.dumps(document, allow_nan=False)
        rollout.text(document)

    return strategy, call, sound


def shadow_log(folder: Path) -> Made:
    """One odd line in a hundred is passed over, so the file is short or has two hundred."""
    many = _frames(2, 200)
    tail = "".join(json.dumps(entry) + "\n" for entry in many[1:]).encode()
    odd = other_values(many[:1]).map(lambda tree: json.dumps(tree).encode() + b"\n" + tail)
    return _rollout(folder, "b", json_lines(*_frames(2, 3)) | odd, json.dumps(many[0]).encode() + b"\n" + tail)


def truth_file(folder: Path) -> Made:
    lines = [{"frame": "1.png", "boxes": [[10, 10, 50, 60, 0]]}, {"frame": "2.png", "boxes": []}]
    return _rollout(folder, "truth", json_lines(*lines), json.dumps(lines[0]).encode())


def rollout_state(folder: Path) -> Made:
    tree = {"schema": 1, "a": ["net", 1], "b": ["net", 2], "status": "running", "stage": 0, "since": 1e9}
    strategy = json_bytes(tree, {**tree, "since": None, "status": "aborted"})
    return _rollout(folder, "state", strategy, json.dumps(tree).encode())


def latency_table(folder: Path) -> Made:
    tree = {
        "schema": 1, "runtime": "onnxruntime", "precision": "fp32", "imgsz": [64, 96], "threads": None, "device": {},
        "whole_ms": 2.0, "layers": {"model.0.conv": [[1e6, 0.5], [2e6, 0.7]]}, "rest": [[1e3, 1.0], [2e3, 1.5]],
    }  # fmt: skip

    def call(content: bytes) -> None:
        (folder / "table.json").write_bytes(content)
        found = read_table(folder / "table.json", (64, 96))
        assert all(np.isfinite(found["layers"][name]).all() for name in found["layers"])

    return json_bytes(tree), call, json.dumps(tree).encode()


def probe_json(folder: Path) -> Made:
    """`layers.json` on a robot, before its networks are built."""
    tree = {
        "nodes": {"model.0.conv": "/model.0/conv"}, "convs": {"model.0.conv": "a"}, "imgsz": [64, 96],
        "networks": [{"file": "dense.onnx", "macs": {"model.0.conv": 1e6}, "precision": "fp32"}],
    }  # fmt: skip

    def call(content: bytes) -> int:
        (folder / layer_times.LAYERS).write_bytes(content)
        return run_command(lambda: bool(layer_times._read_probe(folder)) - 1)

    return json_bytes(tree), call, json.dumps(tree).encode()


def coco_json(folder: Path) -> Made:
    """Labels that a robot measures its mAP by."""
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 7, "name": "bolt"}, {"id": 8, "name": "nut"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 20], "iscrowd": 0}],
    }

    def call(content: bytes) -> int:
        (folder / "coco.json").write_bytes(content)
        return run_command(lambda: len(groundtruth.coco_file(folder / "coco.json", folder, ["bolt", "nut"])) and 0)

    return json_bytes(tree), call, json.dumps(tree).encode()


def _doors() -> Iterator[Door]:
    shares = {
        command_line: 1700, recipe_yaml: 1300, data_yaml: 1500, label_file: 1200, list_file: 800, image_file: 1500, checkpoint: 1000,
        onnx_file: 1500, artefact_manifest: 800, engine_sidecar: 700, bundle_manifest: 700, slot_mark: 500, golden_json: 700,
        golden_image: 600, quant_json: 600, calibration_cache: 500, preflight_cache: 800, device_json: 400, shadow_log: 600,
        truth_file: 400, rollout_state: 400, latency_table: 500, probe_json: 300, coco_json: 500, policy_json: 300, cascade_json: 200,
    }  # fmt: skip
    for make, share in shares.items():
        yield Door(make.__name__.replace("_", " "), share, make)


DOORS = tuple(_doors())
