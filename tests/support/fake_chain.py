"""A whole chain of fake stages that take milliseconds and resume, and a loop that kills its commands at random instants.

`python -m tests.support.fake_chain --kills 200` runs the loop; a test runs it with fewer kills. Each pass of a stage gives other
bytes, as a training on a GPU does. `fake_release.py` has the loop's bundles and robot.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import report_case
from tests.support.fake_release import KEY, Release, onnx_model, small_bundles, switch
from yolo_compress import pipeline, preflight, stages
from yolo_compress.chain import STAGES, current, plan
from yolo_compress.cli.main import main
from yolo_compress.data.dataset import Dataset
from yolo_compress.files.atomic import atomic_write
from yolo_compress.recipe import recipe
from yolo_compress.report.write import write
from yolo_compress.runtime.secure.signed_manifest import KEY_VARIABLE
from yolo_compress.status import status
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store

RECIPE = """
data: {yaml: x.yaml}
baseline: {model: yolov8n.yaml, epochs: 3}
prune: {epochs: 2}
export: {}
engine: {}
bench: {}
report: {}
"""
TRAINED = ("baseline", "prune")
EPOCHS = 4
FRESH = 16  # random bytes in each model
MODEL = "compressed/fp32.onnx"  # in the artefact of `export`


class Killed(BaseException):
    """Raised by a test inside a stage."""


@dataclass
class Chain:
    """A working folder, and fake stages that replace the real ones.

    Attributes:
        folder: Where `r.yaml` and `weights/` are.
        stop_after: The epoch in which the next training raises `Killed`; None for never.
        ran: Stages in the order in which they ran, each with its first epoch.
    """

    folder: Path
    stop_after: int | None = None
    ran: list[tuple[str, int]] | None = None

    @property
    def store(self) -> Store:
        return Store(self.folder / "weights")

    def recipe(self, name: str = "r", *overrides: tuple[str, str]) -> recipe.Recipe:
        file = self.folder / f"{name}.yaml"
        file.write_text(RECIPE)
        return recipe.load(file, overrides)

    def run(self, target: str, again: bool = False, **kind: Any) -> Artifact:
        """Run the recipe `r` up to `target`. `ran` then has the stages that ran."""
        self.ran = []
        return pipeline.run(kind.pop("recipe", None) or self.recipe(), target, store=self.store, again=again)

    def states(self) -> dict[str, str]:
        return {row.stage: row.state for row in status(self.recipe(), self.store)}

    def saved(self) -> dict[str, int]:
        """Return the finished epochs of each interrupted training by the name of its artefact, if its inputs are unchanged."""
        baseline = self.store.linked("r", "baseline")
        contents = dict.fromkeys(STAGES["prune"].needs, baseline.manifest.content) if baseline else {}
        found = {}
        for file in self.store.folder.glob("*.partial/work/resume.json"):
            state, name = json.loads(file.read_text()), file.parents[1].name.removesuffix(".partial")
            if state["of"] == _digest(contents if name.startswith("prune") else {}):
                found[name] = state["epoch"]
        return found

    def _stage(self, name: str) -> types.ModuleType:
        module = types.ModuleType(f"yolo_compress.stages.{name}")
        module.check = lambda recipe, dataset: None  # type: ignore[attr-defined]
        module.run = lambda job: self._work(name, job)  # type: ignore[attr-defined]
        module.add = lambda job, published, files: self._add(job)  # type: ignore[attr-defined]
        return module

    def _work(self, stage: str, job: Any) -> dict[str, Any]:
        inputs = {need: artifact.manifest.content for need, artifact in job.inputs.items()}
        resume, epoch, of = job.work / "resume.json", 0, _digest(inputs)
        if stage in TRAINED and resume.exists():
            state = json.loads(resume.read_text())
            epoch = state["epoch"]
            assert state["of"] == of, f"{stage} continues a training that started from other bytes"
        if self.ran is not None:
            self.ran.append((stage, epoch))
        while stage in TRAINED and epoch < EPOCHS:
            if self.stop_after is not None and epoch == self.stop_after:
                raise Killed
            time.sleep(0.002)
            epoch += 1
            atomic_write(resume, json.dumps({"epoch": epoch, "of": of}))
        atomic_write(job.out / "model.pt", os.urandom(FRESH))
        atomic_write(job.out / "of.json", json.dumps(inputs))
        if stage == "export":
            (job.out / "compressed").mkdir()
            atomic_write(job.out / MODEL, onnx_model(os.urandom(FRESH), job.imgsz_hw))
        if stage == "bench":
            return {"rows": []}
        if stage != "report":
            return {}
        atomic_write(job.out / "report.html", job.recipe.name)
        passed = job.config.min_retention < 1
        return {"gate": {"passed": passed}, "verdict": {"line": "" if passed else "FAIL"}, "table": ""}

    def _add(self, job: Any) -> dict[str, Any]:
        write(report_case.whole(recipe=job.recipe.name), [], job.out)
        return {"gate": {"passed": True}, "table": ""}


def _digest(contents: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


@contextlib.contextmanager
def fake_chain(folder: Path) -> Iterator[Chain]:
    """Make a chain in a folder, which is the working folder during the block."""
    chain = Chain(folder)
    dataset = Dataset(Path("x.yaml"), ("a",), 3, (), (), (), (), "d" * 64, "t" * 64, "v" * 64)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses no written bytes, only a power cut does
        patch.setattr(preflight, "_load_dataset", lambda recipe, store: dataset)
        patch.setattr(pipeline, "recheck", lambda dataset: None)
        patch.setattr(pipeline.environment, "describe", lambda: {"packages": {}})
        for name in STAGES:
            module = chain._stage(name)
            patch.setitem(sys.modules, module.__name__, module)
            patch.setattr(stages, name, module, raising=False)
        patch.setattr("yolo_compress.report.html.render", lambda document, gallery: "<html>" * 100_000)  # takes no time
        chain.recipe()
        yield chain


def sound(store: Store) -> dict[str, Artifact]:
    """Return all artefacts with a final name, by that name. Raise if one is not complete."""
    found = {}
    for path in store.folder.iterdir() if store.folder.exists() else []:
        stage, _, short = path.name.partition("-")
        if stage in STAGES and len(short) == 16:
            artifact = store.find(stage, json.loads((path / "manifest.json").read_bytes())["fingerprint"])
            assert artifact is not None
            store.verify(artifact)
            found[path.name] = artifact
    return found


COMMANDS = (
    ("run", "recipe=r.yaml"),
    ("baseline", "recipe=r.yaml", "force=true"),
    ("prune", "recipe=r.yaml", "force=true"),
    ("prune", "recipe=r.yaml", "prune.epochs=9"),
    ("report", "recipe=r.yaml", "force=true"),
    ("gc",),
    ("gc", "recipe=r.yaml"),
    ("report", "recipe=r.yaml", "add=more.json", "out=shown"),
    ("bundle", "recipe=r.yaml", f"key={KEY}", "version={next}", "out=bundles/{next}"),
    ("bundle", "recipe=r.yaml", f"key={KEY}", "version={next}", "out=bundles/{next}.tar"),
    ("bundle", "recipe=r.yaml", f"key={KEY}", "version={next}", "out=bundles/{next}.tar.gz", "target=triton"),
    (
        "bundle",
        "recipe=r.yaml",
        f"key={KEY}",
        "version={next}",
        "out=bundles/{next}",
        "report.min_retention=1",
        "force=true",
    ),
    ("bundle", "recipe=r.yaml", f"key={KEY}", "version={next}", "out=bundles/{last}", "force=true"),
    ("switch.py", "install", "{shipped}", "--root={robot}"),
    ("switch.py", "install", "{shipped}", "--root={robot}", "--force"),
    ("switch.py", "rollback", "--root={robot}"),
    ("switch.py", "switch", "--root={robot}"),
    ("switch.py", "status", "--root={robot}"),
)
"""`Release.words` replaces the names in braces."""


def kill_loop(chain: Chain, kills: int, seed: int) -> dict[str, int]:
    """Start commands, kill each at a random instant, and check the store, the bundles and the robot's slots.

    Only commands that were still running count as killed. About half of them run again at once, to their end; the others
    leave what the kill left to later commands.

    Returns:
        How often each command was killed.
    """
    dice, before, killed = random.Random(seed), dict[str, Artifact](), dict[str, int]()
    seconds = dict.fromkeys(COMMANDS, 0.2)
    write(report_case.whole(recipe="r"), [], Path("whole"))
    Path("more.json").write_text(json.dumps({"schema": 1, "bundle": {}, "rows": []}))
    with small_bundles(), pytest.MonkeyPatch.context() as patch:
        release, exports = Release(chain.folder), set[str]()
        patch.setenv(KEY_VARIABLE, f"{chain.folder / KEY}.pub")
        while sum(killed.values()) < kills:
            command = dice.choice(COMMANDS)
            words, limit = release.words(command), dice.uniform(0, seconds[command])
            for wait in (limit, None):
                epochs, started = chain.saved(), time.monotonic()
                expected = release.exit_code(words)
                code = _run(words, chain.folder / "said.txt", wait, alone=dice.random() < 0.5)
                assert code in (None, expected), (
                    f"{words}: {code}, {expected} expected: {(chain.folder / 'said.txt').read_text()}"
                )
                before = check(chain, before, epochs)
                exports |= {_sha256(one.file(MODEL)) for one in before.values() if one.stage == "export"}
                release.check(words, code == 0, exports)
                if code is not None:
                    seconds[command] = 1.2 * (time.monotonic() - started)
                    break
                killed[" ".join(command)] = killed.get(" ".join(command), 0) + 1
                seconds[command] *= 1.1  # on a slow machine it must end sometimes too
                if dice.random() < 0.5:
                    break
    chain.run("report")
    assert set(chain.states().values()) <= {"up to date", "left out"}, chain.states()
    assert main(["gc"]) == 0
    assert not list(chain.store.folder.glob("*.trash"))
    return killed


def _run(words: tuple[str, ...], said: Path, wait: float | None, alone: bool) -> int | None:
    """Run a command. Return its exit code, or None if it was killed.

    Args:
        wait: Seconds until it is killed; None to let it end.
        alone: Kill only the command's own process, not those that it started.
    """
    started, child = time.monotonic(), os.fork()
    if child == 0:
        _child(words, said)
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(child, child)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (wait is None or time.monotonic() - started < wait) and os.waitid(os.P_PID, child, ended) is None:
        time.sleep(0.001)
    (os.kill if alone else os.killpg)(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _child(words: tuple[str, ...], said: Path) -> None:
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = 99
        try:
            os.setpgid(0, 0)
            code = switch(words) if words[0] == "switch.py" else main(list(words))
        finally:
            file.flush()
            os._exit(code)


def check(chain: Chain, before: dict[str, Artifact], epochs: dict[str, int]) -> dict[str, Artifact]:
    """Check the invariants of the store after a kill. Return the published artefacts."""
    chain.states()  # like any reader, this finishes a publication that was committed
    there = sound(chain.store)
    links = {stage: one for stage in STAGES if (one := chain.store.linked("r", stage))}
    for name in before:  # an artefact whose friendly name belongs to another one now is garbage
        assert name in there or any(one.stage == before[name].stage for one in links.values()), f"lost {name}"
    recipe, dataset = preflight.prepare(chain.recipe(), chain.store)
    planned = plan(recipe, dataset, "report")
    now = current(chain.store, planned)
    for stage, artifact in now.items():
        made_of = {need: now[source].manifest.content for need, source in planned[stage].inputs.items()}
        assert json.loads(artifact.file("of.json").read_text()) == made_of, (
            f"{stage} is up to date, but made from other bytes"
        )
    saved = chain.saved()
    for name, epoch in epochs.items():
        published = name in there and there[name] != before.get(name)
        other = name.startswith("prune") and _baseline(there) != _baseline(before)
        assert published or other or saved.get(name, 0) >= epoch, f"{name} lost epochs: {epoch} -> {saved.get(name)}"
    for file in Path("shown").glob("report.*"):
        assert file.read_bytes() == (Path("whole") / file.name).read_bytes(), f"{file} is not whole"
    return there


def _baseline(artifacts: dict[str, Artifact]) -> list[Artifact]:
    return [one for one in artifacts.values() if one.stage == "baseline"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, fake_chain(Path(scratch)) as made:
        print(json.dumps(kill_loop(made, asked.kills, asked.seed)))
