"""Every command, Python block and recipe of README and docs, run in the folder of a finished chain, with small settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.pipeline.conftest import Bench
from tests.support.pages import PAGES, ROOT, blocks, commands
from yolo_compress.cli import grammar, verbs
from yolo_compress.cli.main import main
from yolo_compress.data.dataset import load
from yolo_compress.recipe import recipe
from yolo_compress.runtime.commands import switch
from yolo_compress.train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# What the docs say -> what is run here. `digits` is a demo of some minutes, the chain here one of 24 images.
SMALL = (
    (r"recipe='?digits'?(?=\s|$)", "recipe=tiny.yaml"),
    (r"weights/digits/", "weights/tiny/"),
    (r"datasets/digits/images/val", "val/images"),
    (r"load\(\"digits\"", 'load("tiny.yaml"'),
)

# Added where a command would train or measure for long.
MORE = (
    (r"yolo-compress prune .*prune\.", "prune.epochs=0 prune.calib_images=8 run.threads=1"),
    (r"yolo-compress qat .*qat\.", "run.threads=1"),
    (
        r"yolo-compress prune recipe='custom'",
        "data.imgsz=64 data.limit_train=8 baseline.epochs=1 prune.epochs=0 prune.calib_images=8 run.threads=1",
    ),
    (r"yolo-compress bundle ", "force=true golden=1"),  # the gate: a chain this short finds next to nothing
    (r"yolo-compress ab ", "replicates=20"),
    (r"layer_times probe", "--threads 1"),
    (r"python3 build\.py", "--runtime onnxruntime --precision int8"),
    (r"python3 bench\.py", "--engine onnxruntime-int8 --iterations 8"),
)

# What is not run here, and why. It is parsed, and of a shipped recipe the overrides are read.
NOT_RUN = {
    "make setup": "makes the environment that this runs in",
    "source .venv/bin/activate": "the same, for a shell",
    "yolo-compress fetch": "downloads; `fetch digits` draws 750 images",
    "python3 slots/current/switch.py rollback": "there is no older bundle; tests/unit/runtime/test_switch.py has one",
    "python3 digits/switch.py install": "builds all engines once more; tests/unit/runtime/test_switch.py does it",
    "python3 slots/current/switch.py status": "nothing was installed",
    "yolo-compress prune recipe=digits prune.latency_ms=": "the milliseconds are those of a machine",
    "yolo-compress prune recipe=digits prune.kind=low_rank": "tests/unit/prune/test_low_rank.py runs the stage",
    "yolo-compress prune recipe=digits prune.then=low_rank": "the same",
    "yolo-compress run recipe=my-recipe.yaml": "minutes; of the same start, `prune` of the recipe `custom` is run",
    "yolo-compress bundle recipe=my-recipe.yaml": "the same",
    **{
        f"yolo-compress {stage} recipe='custom'": "the same"
        for stage in ("distill", "qat", "engine", "bench", "report")
    },
    "yolo-compress run recipe=yolov8s-coco": "a GPU and some days",
    "yolo-compress prune recipe='yolov8s-coco'": "the same",
    "yolo-compress prune recipe=yolov8s-coco run.device=0,1": "two GPUs; tests/cuda_on_cpu/test_ranks.py has two ranks on a CPU",
    "torchrun": "several GPUs",
    "pip install ai-edge-litert": "part of the environment that this runs in",
    "pip install coremltools": "the same; and on a Mac",
    "python3 check.py --data FOLDER": "a Mac; tests/unit/runtime/test_coreml.py runs it with a stand-in",
    "pip install ncnn pnnx": "part of the environment that this runs in",
    "yolo-compress control recipe=digits": "more training; the finished chain has all controls",
    "yolo-compress cascade": "two chains, and more training images than there are; tests/unit/cli/test_cascade_command.py does it",
    "yolo-compress predict engine=my-cascade": "the same",
    "yolo-compress bundle recipe=digits cascade=my-cascade": "the same; tests/pipeline/test_bundle.py makes such a bundle",
    "pip install 'yolo-compress[search]'": "part of the environment that this runs in",
    "yolo-compress search": "many trainings; tests/pipeline/test_search.py has a trial",
    "yolo-compress lint weights/digits/export/compressed/int8.onnx target=tensorrt-rtx": "tests/unit/lint/test_rtx.py does it",
}
GATED = ("run", "report", "bundle", "ab")  # may end with 1: a chain this short may fail its gate


def not_run(command: str) -> str | None:
    """The entry of NOT_RUN that a command falls under."""
    return next((start for start in NOT_RUN if command.startswith(start)), None)


class Reader:
    """Does what a page says, in one folder. A command is done once, however many pages name it."""

    def __init__(self, folder: Path, data: str) -> None:
        self.folder, self.data, self.done = folder, data, set[str]()
        python = folder / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)

    def small(self, text: str) -> str:
        for pattern, instead in (*SMALL, (r"(?<![\w/])digits\.yaml", self.data)):
            text = re.sub(pattern, instead, text)
        return text

    def do(self, command: str) -> str | None:
        """Run or parse a command; gives what went wrong."""
        if command in self.done:
            return None
        self.done.add(command)
        if not_run(command):
            return parsed(command)
        if command.startswith("make ") and command != "make help":
            return next(filter(None, map(self.do, made(command))), None)
        more = [extra for pattern, extra in MORE if re.search(pattern, command)]
        return self.run(self.small(" ".join([command, *more])))

    def run(self, command: str) -> str | None:
        words = shlex.split(command)
        if words[0] == "yolo-compress" and ">" not in words:
            return called(words[1:])
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        where = ROOT if words[0] == "make" else self.folder
        done = subprocess.run(
            ["bash", "-c", command], cwd=where, capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "YOLO_COMPRESS_KEY": ""},
        )  # fmt: skip
        return (
            f"{command}: exit code {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}"
            if done.returncode
            else None
        )


def called(words: list[str]) -> str | None:
    """The command line in this process, which has torch already; what it leaves to the process is put back."""
    before = signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(1)  # as tests run beside other work, a second one would only wait
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as a user calls it
            code = main(words)
    finally:
        signal.signal(signal.SIGTERM, before)
    return None if code in ((0, 1) if words[0] in GATED else (0,)) else f"{' '.join(words)}: exit code {code}"


def made(command: str) -> list[str]:
    """What a `make` command of the docs would run, by the Makefile itself."""
    shown = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = re.sub(r"\\\n\s*", "", shown.stdout).splitlines()
    found = [line.partition("yolo-compress ")[2] for line in lines if "/yolo-compress " in line]
    assert found, f"{command}: runs no yolo-compress\n{shown.stdout}"
    return [f"yolo-compress {re.sub(' *(>&2|> /dev/null)$', '', line).strip()}" for line in found]


def parsed(command: str) -> str | None:
    """Read a command as the program would; gives what is wrong with it."""
    words = shlex.split(command)
    if "switch.py" in command:
        with pytest.raises(SystemExit) as ended:
            switch.main([*words[2:], "--help"])
        return None if ended.value.code == 0 else f"{command}: not understood"
    if "yolo_compress" in words:  # torchrun ... -m yolo_compress VERB
        words = ["yolo-compress", *words[words.index("yolo_compress") + 1 :]]
    if words[0] != "yolo-compress":
        return None
    given = grammar.parse(words[1:])
    if verbs.VERBS[given.verb].knobs:
        recipe.load(given.recipe, given.overrides)
    return None


@pytest.fixture(scope="module")
def reader(finished: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A copy of the finished chain with what the docs take for granted: a user's data and checkpoints, a robot's files."""
    folder = tmp_path_factory.mktemp("docs") / "user"
    folder.mkdir()  # without what other tests left beside the chain
    for part in ("datasets", "weights"):  # published files are never altered
        shutil.copytree(finished.folder / part, folder / part, symlinks=True, copy_function=os.link)
    shutil.copyfile(finished.folder / "tiny.yaml", folder / "tiny.yaml")
    before = os.getcwd()
    os.chdir(folder)
    given = yaml.safe_load((folder / "tiny.yaml").read_text())["data"]["yaml"]
    own_data(folder, given)
    onnx = (folder / "weights/tiny/export/compressed/int8.onnx").read_bytes()
    (folder / "device.json").write_text(json.dumps(device(hashlib.sha256(onnx).hexdigest())))
    for name, version in (("a.jsonl", 7), ("b.jsonl", 8)):
        (folder / name).write_text("".join(json.dumps(line(frame, version)) + "\n" for frame in range(20)))
    yield Reader(folder, given)
    os.chdir(before)


def own_data(folder: Path, name: str) -> None:
    """`my.yaml` and `val/` of eight images each of the data yaml `name`, and checkpoints of other classes in `weights/`."""
    data = load(name, limit_train=8, limit_val=8)
    for split, samples in (("train", data.train), ("val", data.val)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number, sample in enumerate(samples):
            shutil.copyfile(sample.image, folder / split / "images" / f"{number:05d}.png")
            rows = "".join(" ".join(map(str, box)) + "\n" for box in sample.boxes)
            (folder / split / "labels" / f"{number:05d}.txt").write_text(rows)
    mine = {"path": ".", "train": "train/images", "val": "val/images", "names": list(data.names)}
    (folder / "my.yaml").write_text(yaml.safe_dump(mine))
    for name in ("yolov8n.pt", "yolov8s.pt", "yolov8l.pt"):
        checkpoint.save_model(
            checkpoint.new_model("yolov8n.yaml", ["person", "bicycle"], 3, seed=0), folder / "weights" / name
        )


def device(onnx: str) -> dict[str, object]:
    """What a robot without labelled images measured."""
    row = {"model": "compressed", "runtime": "tensorrt", "precision": "int8", "status": "ok", "reason": None,
           "map50_95": None, "latency_p50_ms": 1.0, "latency_n": 700}  # fmt: skip
    about = {"name": "tiny", "version": 1, "onnx": {"int8": onnx}}
    return {"schema": 1, "bundle": about, "device": {"board": "a robot"}, "rows": [row],
            "runtime": "tensorrt", "library": "10.3.0", "golden": None}  # fmt: skip


def line(frame: int, version: int) -> dict[str, object]:
    """A line of a shadow log."""
    return {"schema": 1, "frame": str(frame), "at": 1e9 + frame, "model": {"name": "digits", "version": version},
            "ms": 5.0, "detections": [[1.0, 2.0, 30.0, 40.0, 0.9, 0.0]], "problem": None}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(reader: Reader, page: Path) -> None:
    failed = [problem for command in commands(page) if (problem := reader.do(command))]
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_yaml_are_what_they_seem(reader: Reader, page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "python"):
        exec(compile(reader.small(block.text), f"{block.page}:{block.line}", "exec"), {"__name__": "example"})
    for number, block in enumerate(blocks(page, "yaml")):
        if "names:" in block.text:  # a data yaml
            assert {"path", "train", "val", "names"} == set(yaml.safe_load(block.text))
            continue
        (tmp_path / f"recipe{number}.yaml").write_text(block.text)
        recipe.load(tmp_path / f"recipe{number}.yaml")


def test_what_is_not_run_is_still_in_the_docs() -> None:
    said = [command for page in PAGES for command in commands(page)]
    by_make = [one for one in said if one.startswith("make ") and one != "make help" and not not_run(one)]
    said += [one for command in by_make for one in made(command)]
    assert set(NOT_RUN) == {start for command in said if (start := not_run(command))}
