"""The chain and its store: which stages run again and which artefacts stay after kills, removals and damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_chain import Chain, Killed, fake_chain, kill_loop, sound
from tests.unit.files.test_strict_json import CASES
from yolo_compress import pipeline
from yolo_compress.cli.main import main
from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.status import status
from yolo_compress.store.manifest import Artifact

STALE = {"export", "engine", "bench", "report"}


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with fake_chain(tmp_path) as made:
        yield made


def published(chain: Chain) -> dict[str, Artifact]:
    """Return the artefacts in the store by stage."""
    return {artifact.stage: artifact for artifact in sound(chain.store).values()}


def killed(chain: Chain, target: str, after: int, again: bool = False) -> None:
    chain.stop_after = after
    with pytest.raises(Killed):
        chain.run(target, again)
    chain.stop_after = None


def stages(chain: Chain) -> list[str]:
    assert chain.ran is not None
    return [stage for stage, _ in chain.ran]


# What runs again


@pytest.mark.fault(74)
def test_force_that_is_killed_keeps_the_artefact_and_continues(chain: Chain) -> None:
    old = chain.run("baseline")
    chain.run("report")
    killed(chain, "baseline", 3, again=True)
    assert chain.run("report") and chain.ran == []  # all is up to date, of the old baseline
    assert chain.store.linked("r", "baseline") == old
    chain.store.verify(old)
    new = chain.run("baseline", again=True)
    assert chain.ran == [("baseline", 3)] and new.path == old.path and new != old
    assert chain.store.linked("r", "baseline") == new == published(chain)["baseline"]
    assert chain.run("baseline") == new and chain.ran == []


def test_status_names_a_force_that_was_killed(chain: Chain) -> None:
    chain.run("baseline")
    killed(chain, "baseline", 1, again=True)
    row = next(iter(status(chain.recipe(), chain.store)))
    assert row.state == "up to date" and "force=true again continues it" in row.why[-1]


def test_other_bytes_with_the_same_fingerprint_make_later_stages_stale(chain: Chain) -> None:
    chain.run("report")
    chain.run("prune", again=True)
    states = chain.states()
    assert {stage for stage, state in states.items() if state == "stale"} == STALE
    why = {row.stage: row.why for row in status(chain.recipe(), chain.store)}
    assert "content of prune: " in why["export"][0] and why["bench"][0].startswith("export has to run first")
    chain.run("report")
    assert stages(chain) == ["export", "engine", "bench", "report"]
    assert set(chain.states().values()) == {"up to date", "left out"}


def test_a_deleted_stage_that_gives_other_bytes(chain: Chain) -> None:
    chain.run("report")
    shutil.rmtree(published(chain)["baseline"].path)
    assert chain.states()["prune"] == "stale"
    chain.run("report")
    assert stages(chain) == ["baseline", "prune", "export", "engine", "bench", "report"]


def test_a_stage_that_runs_again_with_the_same_bytes_leaves_later_stages_up_to_date(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.urandom", lambda count: bytes(count))
    chain.run("report")
    chain.run("baseline", again=True)
    shutil.rmtree(published(chain)["prune"].path)
    chain.run("report")
    assert stages(chain) == ["prune"]


def test_a_training_does_not_continue_from_other_bytes(chain: Chain) -> None:
    killed(chain, "prune", 2)  # in the baseline
    chain.run("baseline")
    assert chain.ran == [("baseline", 2)]
    killed(chain, "prune", 3)
    assert list(chain.saved().values()) == [3]
    chain.run("baseline", again=True)
    chain.run("prune")
    assert chain.ran == [("prune", 0)]


@pytest.mark.parametrize("file", ["manifest.json", "model.pt"])
def test_force_replaces_a_damaged_artefact(chain: Chain, file: str) -> None:
    damaged = chain.run("prune")
    (damaged.path / file).write_bytes(b"{")
    with pytest.raises(CorruptArtifact, match="rm -r"):
        chain.run("report")
    mended = chain.run("prune", again=True)
    chain.store.verify(mended)
    chain.run("report")


@pytest.mark.fault(79)
def test_no_training_starts_where_the_name_is_taken(chain: Chain) -> None:
    (chain.folder / "weights/r/prune").mkdir(parents=True)
    with pytest.raises(StorageError, match="move it away"):
        chain.run("prune")
    (chain.folder / "weights/r/prune").rmdir()
    chain.run("prune")
    assert stages(chain) == ["baseline", "prune"]


# Names


@pytest.mark.parametrize(
    "name", ["my recipe", "détecteur", "Детектор", "日本", "a+b", "Bob's", "x🙂", "a,b (2)", "50%"]
)
def test_every_name_that_load_takes_works_in_the_store(chain: Chain, name: str) -> None:
    chain.run("report", recipe=chain.recipe(name))
    assert name in chain.store.recipes() and chain.store.linked(name, "report") is not None
    before = set(published(chain))
    assert main(["gc"]) == 0 and set(published(chain)) == before


@pytest.mark.parametrize("name", ["store", "-x", ".x", "_x", "a\nb"])
def test_a_name_that_the_store_refuses_is_refused_at_load(chain: Chain, name: str) -> None:
    with pytest.raises(RecipeError, match="rename the file"):
        chain.recipe(name)
    with pytest.raises(RecipeError, match="rename the file"):
        chain.store.check_name(name, "prune")


def test_recipes_of_one_content_have_each_a_report_of_their_own(chain: Chain) -> None:
    first = chain.run("report")
    second = chain.run("report", recipe=chain.recipe("other"))
    assert stages(chain) == ["report"]
    assert first.path != second.path
    shown = [one.file("report.html").read_text() for one in (first, second)]
    assert shown == ["r", "other"]


def test_a_report_shows_the_knobs_that_made_no_other_bytes(chain: Chain) -> None:
    chain.run("report")
    other = chain.recipe("r", ("run.workers", "3"))
    row = next(row for row in status(other, chain.store) if row.stage == "report")
    assert row.state == "stale" and row.why == ("recipe.run.workers: 0 -> 3",)


def test_a_bench_on_a_gpu_is_another_one(chain: Chain) -> None:
    """Its rows of torch are measured on `run.device`; the models before it are the same wherever they were trained."""
    chain.run("bench")
    rows = {row.stage: row for row in status(chain.recipe("r", ("run.device", "0")), chain.store)}
    assert rows["bench"].state == "stale" and rows["bench"].why == ("machine.device: not set -> 0",)
    assert {rows[stage].state for stage in ("baseline", "prune", "export", "engine")} == {"up to date"}


# gc


def gc(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["gc", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.fault(74)
@pytest.mark.parametrize("words", [(), ("recipe=r.yaml",)])
def test_gc_keeps_a_training_that_was_interrupted(
    chain: Chain, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    killed(chain, "prune", 3)
    answer = gc(capsys, *words)
    assert (answer["removed"], answer["interrupted"]) == (0, 1)
    chain.run("prune")
    assert chain.ran == [("baseline", 3), ("prune", 0)]


def test_gc_keeps_a_stage_that_has_only_to_be_published(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    made = chain.run("prune")
    made.path.rename(made.path.with_name(made.path.name + ".partial"))
    assert gc(capsys)["removed"] == 0
    chain.run("prune")
    assert chain.ran == [] and chain.store.linked("r", "prune") == made


@pytest.mark.fault(74)
def test_gc_keeps_what_the_recipe_given_needs(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    chain.run("report")
    shutil.rmtree(chain.folder / "weights/r")
    assert gc(capsys, "recipe=r.yaml")["removed"] == 0
    assert gc(capsys, "recipe=r.yaml", "prune.epochs=9")["removed"] == 5
    assert set(published(chain)) == {"baseline"}
    assert gc(capsys)["removed"] == 1


def test_gc_of_a_recipe_that_cannot_be_planned_removes_nothing(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.run("baseline")
    shutil.rmtree(chain.folder / "weights/r")
    assert main(["gc", "recipe=r.yaml", "baseline.weights=gone.pt"]) == 4
    assert "gone.pt" in capsys.readouterr().err and set(published(chain)) == {"baseline"}


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"prune", b"prunf", 1))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", [flipped, Path.unlink, folder, pipe, lambda path: path.write_bytes(b"\xff")])
def test_a_damaged_manifest_does_not_stop_gc(chain: Chain, damage, capsys: pytest.CaptureFixture[str]) -> None:
    made = chain.run("report")
    chain.run("report", recipe=chain.recipe("other"))
    damaged = chain.store.linked("r", "prune")
    orphan = chain.store.folder / f"qat-{'0' * 16}"
    orphan.mkdir()
    damage(damaged.path / "manifest.json")
    capsys.readouterr()
    assert main(["gc"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == [f"removed weights/store/{path.name}" for path in (damaged.path, orphan)]
    assert set(published(chain)) == {"baseline", "export", "engine", "bench", "report"}
    chain.run("report")
    assert stages(chain)[:1] == ["prune"] and chain.store.find("report", made.fingerprint) is not None


# Nothing is written into the store


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    "out", ["weights/store", "weights/store/new", "weights/r/report", "aside/report", "{}", "{}/x/y"]
)
def test_a_report_is_not_written_into_the_store(chain: Chain, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = chain.run("report")
    (chain.folder / "aside").symlink_to(chain.folder / "weights/r")
    (chain.folder / "more.json").write_text(json.dumps({"schema": 1, "bundle": {}, "rows": []}))
    chain.ran = []
    assert main(["report", "recipe=r.yaml", "add=more.json", f"out={out.format(report.path)}"]) == 2
    assert "lies in the artefact store" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="lies in the artefact store"):
        pipeline.report_over(chain.recipe(), [Path("more.json")], Path(out.format(report.path)), store=chain.store)
    assert chain.ran == []
    chain.store.verify(report)


@pytest.mark.fault(89)
@pytest.mark.parametrize(
    "words",
    [
        ("ab", "a=a.pt", "b=b.pt", "data=d.yaml", "out={}/latency.json"),
        ("predict", "source=a.jpg", "engine=weights/r/engine", "out={}"),
        ("bundle", "recipe=r.yaml", "out={}/new.tar"),
        ("probe", "recipe=r.yaml", "out={}/new"),
        ("init", "data.yaml=d.yaml", "weights=n.pt", "out={}/r.yaml"),
        ("keygen", "out={}/key"),
        ("rollout", "a=a", "b=b", "state={}/report.html"),
    ],
)
def test_no_verb_writes_into_an_artefact(
    chain: Chain, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    report = chain.run("report")
    assert main([word.format("weights/r/report") for word in words]) == 2
    assert "lies in the artefact store" in capsys.readouterr().err
    chain.store.verify(report)


def test_an_artefact_of_another_store_is_one_too(chain: Chain, tmp_path: Path) -> None:
    report = chain.run("report")
    shutil.move(chain.folder / "weights", chain.folder / "there")
    with pytest.raises(RecipeError, match="lies in the artefact store"):
        chain.store.check_outside(chain.folder / "there/store" / report.path.name / "x", "out")
    for outside in ("report-r", "there", "weights/r-new", "weights/stored", f"mine/{report.path.name}"):
        chain.store.check_outside(Path(outside), "out")


def test_a_report_in_a_folder_of_the_user_does_not_write_through_links(chain: Chain) -> None:
    report = chain.run("report")
    (chain.folder / "mine").mkdir()
    (chain.folder / "mine/report.html").symlink_to(report.file("report.html"))
    (chain.folder / "more.json").write_text(json.dumps({"schema": 1, "bundle": {}, "rows": []}))
    pipeline.report_over(chain.recipe(), [Path("more.json")], Path("mine"), store=chain.store)
    chain.store.verify(report)
    assert "<html>" in (chain.folder / "mine/report.html").read_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", ["manifest.json", "work.json", ".lock", "model.pt"])
def test_a_damaged_file_of_the_store_is_one_line(
    chain: Chain, capsys: pytest.CaptureFixture[str], file: str, case: str
) -> None:
    """Exit code 5 for a damaged result. A damaged cache or lock file is ignored and written again."""
    if file == "work.json":
        chain.run("baseline")
        killed(chain, "prune", 2)
        found = next(chain.store.folder.glob("prune-*.partial")) / file
    else:
        chain.run("report")
        found = (chain.store.root if file == ".lock" else chain.store.linked("r", "baseline").path) / file
    assert found.is_file()
    found.write_bytes(CASES[case][0])
    capsys.readouterr()
    code = main([*(["prune", "force=true"] if file == "model.pt" else ["run"]), "recipe=r.yaml"])
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    errors = [line for line in lines if line.startswith("error: ")]
    if file in ("manifest.json", "model.pt"):
        assert code == 5 and len(errors) == 1 and f"/{file} " in errors[0] and "rm -r " in errors[0]
    else:
        assert code == 0 and not errors


def test_a_damaged_report_is_not_shown_with_others(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    report = chain.run("report")
    (chain.folder / "more.json").write_text(json.dumps({"schema": 1, "bundle": {}, "rows": []}))
    report.file("report.html").write_text("another")
    assert main(["report", "recipe=r.yaml", "add=more.json", "out=mine"]) == 5
    assert "report.html has 7 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 10_000])
def test_a_report_that_cannot_be_written_leaves_the_one_before(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    chain.run("report")
    (chain.folder / "mine").mkdir()
    (chain.folder / "more.json").write_text(json.dumps({"schema": 1, "bundle": {}, "rows": []}))
    (chain.folder / "mine/report.html").write_text("the one before")
    write = os.write

    def full(descriptor: int, content: memoryview) -> int:
        if not room or len(content) < 500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[:room])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        pipeline.report_over(chain.recipe(), [Path("more.json")], Path("mine"), store=chain.store)
    assert [file.name for file in (chain.folder / "mine").iterdir()] == ["report.html"]
    assert (chain.folder / "mine/report.html").read_text() == "the one before"


# Kills


@pytest.mark.fault(46, 72, 91)
@pytest.mark.slow
def test_kills_at_random_instants_lose_nothing(chain: Chain) -> None:
    """For a longer run: `python -m tests.support.fake_chain --kills 200`."""
    killed = kill_loop(chain, kills=24, seed=7)
    assert sum(killed.values()) == 24
