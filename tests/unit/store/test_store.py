"""An artefact is complete or absent and every byte is checked, despite kills, full disks and parallel processes."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.files.atomic import atomic_write
from yolo_compress.runtime.files import sha256_file
from yolo_compress.store.fingerprint import canonical, explain, fingerprint
from yolo_compress.store.garbage import gc
from yolo_compress.store.manifest import Artifact, Manifest
from yolo_compress.store.store import Store

PAYLOAD = {"model.pt": b"weights" * 300, "plots/gamma.json": b"[1, 2]", "empty.txt": b""}


def key_of(epochs: int, stage: str = "prune") -> dict:
    return {"stage": stage, "version": 3, "config": {"epochs": epochs, "sizes": (1, 2)}, "inputs": {}}


def make(store: Store, epochs: int = 1, stage: str = "prune") -> Artifact:
    """Run a stage from the start, or resume it after a kill."""
    key = key_of(epochs, stage)
    name = fingerprint(key)
    if found := store.find(stage, name):
        return found
    partial = store.partial(stage, name)
    (partial / "work").mkdir(exist_ok=True)
    atomic_write(partial / "work" / "last.pt", b"resume from here")
    (partial / "plots").mkdir(exist_ok=True)
    for file, content in PAYLOAD.items():
        atomic_write(partial / file, content)
    return store.publish(stage, name, key, {"map50_95": 0.5}, {"torch": "2"}, 1.5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "weights")


def entries(store: Store) -> set[str]:
    """Return the names in the store, without its lock."""
    return {path.name for path in store.folder.iterdir()} - {".publishing"}


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_what_was_published_is_found_and_verifies(store: Store) -> None:
    made = make(store)
    found = store.find("prune", made.fingerprint)
    assert found == made and found.path == store.root / "store" / f"prune-{fingerprint(key_of(1))[:16]}"
    store.verify(found)
    assert tree(found.path) == {*PAYLOAD, "manifest.json"}
    assert found.metrics == {"map50_95": 0.5} and found.stage == "prune" and found.manifest.version == 3
    assert found.manifest.files["model.pt"] == {"size": 2100, "sha256": sha256_file(found.file("model.pt"))}
    assert found.manifest.key["config"]["sizes"] == [1, 2]
    assert not list(store.folder.glob("*.partial"))
    with pytest.raises(CorruptArtifact, match=r"no file best\.pt"):
        found.file("best.pt")


def test_what_was_not_published_is_not_found(store: Store) -> None:
    name = fingerprint(key_of(1))
    assert store.find("prune", name) is None
    (store.partial("prune", name) / "model.pt").write_bytes(b"half")
    assert store.find("prune", name) is None
    assert (store.partial("prune", name) / "model.pt").read_bytes() == b"half"


@pytest.mark.parametrize("damaged", [False, True])
def test_the_old_artefact_stays_until_the_new_one_takes_its_place(store: Store, damaged: bool) -> None:
    made = make(store)
    if damaged:
        (made.path / "manifest.json").write_text("{")
    partial = store.partial("prune", made.fingerprint)
    (partial / "model.pt").write_bytes(b"other bytes")
    if not damaged:
        assert store.find("prune", made.fingerprint) == made
    again = store.publish("prune", made.fingerprint, key_of(1), {"map50_95": 0.1}, {}, 9.0)
    assert again == store.find("prune", made.fingerprint) and again.path == made.path
    store.verify(again)
    assert tree(again.path) == {"model.pt", "manifest.json"} and again.metrics == {"map50_95": 0.1}
    assert entries(store) == {again.path.name}


def test_an_artefact_that_was_moved_elsewhere_by_a_link_is_replaced_and_not_deleted(
    store: Store, tmp_path: Path
) -> None:
    made = make(store)
    made.path.rename(tmp_path / "elsewhere")
    made.path.symlink_to(tmp_path / "elsewhere")
    (store.partial("prune", made.fingerprint) / "model.pt").write_bytes(b"other bytes")
    again = store.publish("prune", made.fingerprint, key_of(1), {}, {}, 9.0)
    store.verify(again)
    assert not again.path.is_symlink() and tree(tmp_path / "elsewhere") == {*PAYLOAD, "manifest.json"}


def test_what_was_begun_from_other_inputs_is_not_continued(store: Store) -> None:
    name = fingerprint(key_of(1))

    def resumable(inputs: dict[str, str] | None) -> bool:
        return (store.partial("prune", name, inputs) / "work" / "last.pt").exists()

    def begin(inputs: dict[str, str]) -> None:
        work = store.partial("prune", name, inputs) / "work"
        work.mkdir()
        (work / "last.pt").write_bytes(b"epoch 90")

    begin({"baseline": "a" * 64})
    assert resumable({"baseline": "a" * 64}) and resumable(None)
    assert not resumable({"baseline": "b" * 64})
    begin({"baseline": "b" * 64})
    assert resumable({"baseline": "b" * 64}) and not resumable({"baseline": "b" * 64, "teacher": "c" * 64})
    begin({"baseline": "b" * 64})
    assert not resumable({})
    begin({})
    assert resumable({}) and not resumable({"baseline": "b" * 64})


def test_the_content_is_that_of_payload_and_metrics(store: Store) -> None:
    def made(content: bytes, metric: float, seconds: float) -> str:
        (store.partial("prune", fingerprint(key_of(1))) / "model.pt").write_bytes(content)
        key = key_of(1)
        return store.publish("prune", fingerprint(key), key, {"map50_95": metric}, {}, seconds).manifest.content

    first = made(b"a", 0.5, 1.0)
    assert made(b"a", 0.5, 2.0) == first and made(b"b", 0.5, 1.0) != first and made(b"a", 0.4, 1.0) != first


def test_a_manifest_of_the_version_before_is_read_as_one_of_unknown_inputs(store: Store) -> None:
    made = make(store)
    old = json.loads(made.manifest.to_json()) | {"schema": 1}
    del old["checksum"], old["inputs"]
    old["checksum"] = hashlib.sha256(canonical(old).encode()).hexdigest()
    (made.path / "manifest.json").write_text(json.dumps(old))
    found = store.find("prune", made.fingerprint)
    assert found is not None and found.manifest.inputs == {} and found.metrics == made.metrics
    store.verify(found)


def test_bugs_of_a_stage_are_refused_before_anything_is_published(store: Store) -> None:
    name = fingerprint(key_of(1))
    partial = store.partial("prune", name)
    with pytest.raises(ValueError, match="loss is nan"):
        store.publish("prune", name, key_of(1), {"loss": float("nan")}, {}, 1.0)
    with pytest.raises(ValueError, match="not the hash of its key"):
        store.publish("prune", name, key_of(2), {}, {}, 1.0)
    (partial / "link.pt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="not a regular file"):
        store.publish("prune", name, key_of(1), {}, {}, 1.0)
    assert store.find("prune", name) is None and partial.is_dir()


def test_leftovers_of_killed_writes_are_not_published(store: Store) -> None:
    name = fingerprint(key_of(1))
    partial = store.partial("prune", name)
    (partial / ".tmp-0123-model.pt").write_bytes(b"half")
    (partial / "manifest.json").write_text("{")
    assert tree(make(store).path) == {*PAYLOAD, "manifest.json"}


# Damage


def damage_extra(path: Path) -> None:
    (path / "plots" / "extra.pt").write_bytes(b"")


def damage_link(path: Path) -> None:
    shutil.move(path / "model.pt", path.parent / "elsewhere.pt")
    (path / "model.pt").symlink_to(path.parent / "elsewhere.pt")


def damage_folder_link(path: Path) -> None:
    (path / "outside").symlink_to("/")


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "model.pt").unlink(), "model.pt is missing"),
        (lambda path: os.truncate(path / "model.pt", 2099), "model.pt has 2099 bytes"),
        (damage_extra, "plots/extra.pt is not listed"),
        (damage_link, "model.pt is missing or no regular file"),
        (damage_folder_link, "outside is not listed"),
        (lambda path: (path / "work").mkdir() or (path / "work" / "x").touch(), "work/x is not listed"),
    ],
)
def test_damage_is_reported_with_a_fix(store: Store, damage, named: str) -> None:
    made = make(store)
    damage(made.path)
    with pytest.raises(CorruptArtifact, match=named) as caught:
        store.verify(made)
    assert f"rm -r '{made.path}'" in str(caught.value) and caught.value.exit_code == 5
    shutil.rmtree(made.path)
    store.verify(make(store))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Store, Artifact]:
    store = Store(tmp_path_factory.mktemp("weights"))
    return store, make(store)


@pytest.mark.fault(23)
@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    file=st.sampled_from(["model.pt", "plots/gamma.json"]),
)
def test_every_flipped_bit_of_the_payload_is_caught(published, share: float, bit: int, file: str) -> None:
    store, made = published
    content = bytearray(PAYLOAD[file])
    content[int(share * len(content))] ^= 1 << bit
    (made.path / file).write_bytes(content)
    with pytest.raises(CorruptArtifact, match=file):
        store.verify(made)
    (made.path / file).write_bytes(PAYLOAD[file])
    store.verify(made)


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_manifest_is_caught_or_means_the_same(published, share: float, bit: int) -> None:
    _, made = published
    content = bytearray(made.manifest.to_json().encode())
    content[int(share * len(content))] ^= 1 << bit
    with contextlib.suppress(ValueError):
        assert Manifest.from_json(bytes(content)) == made.manifest


def test_every_truncated_manifest_is_caught(store: Store) -> None:
    made = make(store)
    path = made.path / "manifest.json"
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptArtifact, match=r"manifest\.json is no valid manifest.*rm -r"):
            store.find("prune", made.fingerprint)
    path.unlink()
    with pytest.raises(CorruptArtifact, match=r"manifest\.json is missing"):
        store.find("prune", made.fingerprint)


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", ["../model.pt", "/etc/passwd", "a/../../b", "", ".", "a//b", "manifest.json"])
def test_a_manifest_cannot_point_outside_its_folder(store: Store, name: str) -> None:
    made = make(store)
    files = {**made.manifest.files, name: {"sha256": "0" * 64, "size": 0}}
    forged = dataclasses.replace(made.manifest, files=files).to_json()
    (made.path / "manifest.json").write_text(forged)
    with pytest.raises(CorruptArtifact, match="not inside its folder"):
        store.find("prune", made.fingerprint)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[1]",
        "{}",
        '{"schema": 2}',
        '{"schema": 3}',
        "[" * 100_000,
        "[" * 900 + "]" * 900,
        '{"schema": 1, "metrics": NaN}',
        "\xff",
    ],
)
def test_what_is_no_manifest_is_called_corrupt(store: Store, text: str) -> None:
    made = make(store)
    (made.path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptArtifact, match="no valid manifest"):
        store.find("prune", made.fingerprint)


@pytest.mark.parametrize(
    "entry", [{"sha256": -0.0, "size": 7}, {"sha256": "0" * 64, "size": "7"}, {"sha256": "0" * 64}, 7]
)
def test_an_entry_of_another_form_is_corrupt(store: Store, entry: object) -> None:
    made = make(store)
    forged = dataclasses.replace(made.manifest, files={**made.manifest.files, "model.pt": entry}).to_json()
    (made.path / "manifest.json").write_text(forged)
    with pytest.raises(CorruptArtifact, match="lacks sha256 or size"):
        store.find("prune", made.fingerprint)


def test_a_manifest_in_another_s_place_is_corrupt(store: Store) -> None:
    one, two = make(store, 1), make(store, 2)
    shutil.copy(two.path / "manifest.json", one.path / "manifest.json")
    with pytest.raises(CorruptArtifact, match="fingerprint is"):
        store.find("prune", one.fingerprint)


def test_manifest_round_trips(published) -> None:
    _, made = published
    assert Manifest.from_json(made.manifest.to_json()) == made.manifest
    assert json.loads(made.manifest.to_json())["schema"] == 2


# Kills and failures

KILLED_STAGES = """
import os, shutil, sys
from pathlib import Path
from yolo_compress.files import atomic
from yolo_compress.files.atomic import atomic_write
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.store import Store

def stage(store):
    key = {"stage": "prune", "version": 3, "config": {"epochs": 2, "sizes": (1, 2)}, "inputs": {}}
    name = fingerprint(key)
    partial = store.partial("prune", name)
    (partial / "work").mkdir()
    (partial / "work" / "last.pt").write_bytes(b"resume from here")
    (partial / "plots").mkdir()
    atomic_write(partial / "model.pt", b"weights" * 300)
    (partial / "plots" / "gamma.json").write_bytes(b"[1, 2]")
    (partial / "empty.txt").write_bytes(b"")
    store.publish("prune", name, key, {"map50_95": 0.5}, {"torch": "2"}, 1.5)

folder, n, status = Path(sys.argv[1]), 0, None
while status != 0:
    n += 1
    shutil.copytree(folder / "0", folder / str(n))
    if (child := os.fork()) == 0:
        atomic.CRASH_AT = n  # what YOLO_COMPRESS_CRASH_AT=n sets, without starting an interpreter for each n
        stage(Store(folder / str(n)))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 137), status
"""


def sound(store: Store) -> list[Artifact]:
    """Return all published artefacts; raise if one is not complete."""
    artifacts = []
    for path in store.folder.iterdir():
        if path.is_dir() and not path.name.endswith(".partial"):
            artifact = Artifact(path, Manifest.from_json((path / "manifest.json").read_bytes()))
            store.verify(artifact)
            artifacts.append(artifact)
    return artifacts


@pytest.mark.fault(46)
def test_a_kill_at_any_step_loses_nothing(tmp_path: Path) -> None:
    expected = make(Store(tmp_path / "uninterrupted"), 2)
    name = expected.fingerprint
    earlier = make(Store(tmp_path / "0"), 1).manifest
    done = subprocess.run([sys.executable, "-c", KILLED_STAGES, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = []
    for n in range(1, len(done.stderr.splitlines()) + 2):
        store = Store(tmp_path / str(n))
        assert earlier in [artifact.manifest for artifact in sound(store)]
        partial = store.folder / f"prune-{name[:16]}.partial"
        trained = (partial / "empty.txt").exists()  # the stage was done and had only to be published
        resumable = (partial / "work" / "last.pt").exists()
        found = store.find("prune", name)
        assert found is not None or resumable or not trained
        states.append("published" if found else "trained" if trained else "working")
        again = make(store, 2).manifest
        assert (again.fingerprint, again.files, again.metrics) == (name, expected.manifest.files, {"map50_95": 0.5})
        assert len(sound(store)) == 2 and not list(store.folder.glob("*.partial"))
    assert states == sorted(states, key=["working", "trained", "published"].index)  # never a step back
    assert states.count("working") > 10 and states.count("trained") > 10
    assert states.count("published") > 6  # what was killed after the manifest was completed, not repeated


@pytest.mark.fault(46)
def test_a_kill_at_any_step_of_a_replacement_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    store = Store(tmp_path / "0")
    key = key_of(2)
    name = fingerprint(key)
    (store.partial("prune", name) / "model.pt").write_bytes(b"old")
    old = store.publish("prune", name, key, {"map50_95": 0.1}, {}, 1.0).manifest
    done = subprocess.run([sys.executable, "-c", KILLED_STAGES, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = []
    for n in range(1, len(done.stderr.splitlines()) + 2):
        store = Store(tmp_path / str(n))
        store.link("bccd", Artifact(store.directory("prune", name), old))
        if n % 2:
            gc(store, {name})  # whatever it finds, as the next command of a user
        found = store.linked("bccd", "prune")
        assert found is not None and found == store.find("prune", name)
        store.verify(found)
        states.append("old" if found.manifest == old else "new")
        assert (found.metrics == {"map50_95": 0.5}) == (states[-1] == "new")
        gc(store, {name})
        assert {entry for entry in entries(store) if not entry.endswith(".partial")} == {found.path.name}
    assert states == sorted(states, reverse=True) and states.count("old") > 10 and states.count("new") > 6


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    ("call", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES), ("open", errno.EROFS)]
)
def test_any_failing_call_is_a_storage_error_and_a_later_run_succeeds(
    tmp_path: Path, monkeypatch, call: str, code: int
) -> None:
    real = getattr(os, call)
    failures = 0
    for n in range(1, 60):
        store = Store(tmp_path / str(n))
        earlier = make(store, 1)
        calls: list[tuple] = []

        def failing(*args, n=n, calls=calls, **kwargs):
            calls.append(args)
            if len(calls) == n:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                make(store, 2)
            except StorageError as error:
                assert os.strerror(code) in str(error) and str(store.root) in str(error)
                failures += 1
        assert earlier in sound(store)
        make(store, 2)
        assert len(sound(store)) == 2
        if len(calls) < n:
            break
    assert failures == n - 1 >= 4


@pytest.mark.fault(50)
def test_an_older_complete_stage_serves_if_the_rename_never_reached_the_disk(store: Store) -> None:
    earlier, made = make(store, 1), make(store, 2)
    made.path.rename(made.path.with_name(made.path.name + ".partial"))  # the folder as it was before the rename
    assert sound(store) == [earlier]
    assert store.find("prune", made.fingerprint) == made


def test_a_committed_partial_that_was_written_to_is_not_published(store: Store) -> None:
    made = make(store)
    partial = made.path.with_name(made.path.name + ".partial")
    made.path.rename(partial)
    (partial / "model.pt").write_bytes(b"training again")
    assert store.find("prune", made.fingerprint) is None
    assert tree(partial) == set(PAYLOAD)


PUBLISHER = """
import sys, time
from pathlib import Path
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.store import Store
key = {"stage": "prune", "version": 3, "config": {"epochs": 2, "sizes": (1, 2)}, "inputs": {}}
print("ready", flush=True)
sys.stdin.readline()
artifact = Store(Path(sys.argv[1])).publish("prune", fingerprint(key), key, {}, {}, 1.0)
print(artifact.path)
"""


@pytest.mark.fault(54)
def test_two_processes_publish_the_same_thing_at_once(store: Store) -> None:
    name = fingerprint(key_of(2))
    (store.partial("prune", name) / "model.pt").write_bytes(os.urandom(1 << 22))
    command = [sys.executable, "-c", PUBLISHER, str(store.root)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    outputs = []
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        outputs.append(process.communicate(timeout=20))
        assert process.returncode == 0, outputs
    assert [out for out, _ in outputs] == [f"{store.directory('prune', name)}\n"] * 2
    assert len(sound(store)) == 1


# Friendly names and garbage


def test_the_friendly_name_follows_and_may_dangle(store: Store) -> None:
    one, two = make(store, 1), make(store, 2)
    assert store.linked("bccd", "prune") is None
    store.link("bccd", one)
    store.link("bccd", two)
    store.link("bccd", two)
    assert os.readlink(store.root / "bccd" / "prune") == f"../store/{two.path.name}"
    assert store.linked("bccd", "prune") == two
    assert explain(key_of(9), two.manifest.key) == ["prune.epochs: 2 -> 9"]
    shutil.rmtree(two.path)
    assert store.linked("bccd", "prune") is None


def test_what_a_user_put_in_the_name_s_place_is_kept(store: Store) -> None:
    made = make(store)
    mine = store.root / "bccd" / "prune"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="move it away"):
        store.link("bccd", made)
    assert (mine / "notes.txt").read_text() == "mine" and store.linked("bccd", "prune") is None
    for name in ("store", "..", "a/b", ".hidden", ""):
        with pytest.raises(RecipeError):
            store.link(name, made)


def test_gc_drops_what_no_recipe_needs_and_nothing_else(store: Store, tmp_path: Path) -> None:
    kept, dropped, damaged = make(store, 1), make(store, 2), make(store, 3)
    (damaged.path / "manifest.json").write_text("{")
    resumable = store.partial("qat", kept.fingerprint)
    stale = store.partial("qat", dropped.fingerprint)
    (stale / "last.pt").write_bytes(b"x" * 100)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.pt").write_bytes(b"1")
    link = store.folder / ("export-" + "a" * 16)
    link.symlink_to(outside)
    (store.folder / "notes.txt").write_text("mine")
    (store.root / "yolov8l.pt").write_bytes(b"source")
    size = sum(path.stat().st_size for path in dropped.path.rglob("*") if path.is_file())

    removed = gc(store, {kept.fingerprint, damaged.fingerprint})

    assert set(removed) == {dropped.path, damaged.path, stale, link}
    assert removed[dropped.path] == size and removed[stale] == 100
    whole = {f"store/{kept.path.name}/{name}" for name in (*PAYLOAD, "manifest.json")}
    assert tree(store.root) == {"yolov8l.pt", "store/notes.txt", "store/.publishing"} | whole
    assert resumable.is_dir() and (outside / "precious.pt").exists()
    assert gc(store, {kept.fingerprint}) == {}
    store.verify(kept)


def test_a_killed_gc_leaves_no_half_artefact(store: Store) -> None:
    made = make(store)
    trash = made.path.with_name(made.path.name + ".trash")
    made.path.rename(trash)
    (trash / "model.pt").unlink()
    assert store.find("prune", made.fingerprint) is None
    store.verify(make(store))
    assert list(gc(store, {made.fingerprint})) == [trash]


def test_gc_of_an_absent_store_removes_nothing(store: Store) -> None:
    assert gc(store, set()) == {}
