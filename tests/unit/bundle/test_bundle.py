"""`yolo-compress bundle`: options are checked first, a failed gate makes no bundle, and a bundle is complete or absent."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.contracts.test_layers import newer_than_38
from tests.support.bundled import IMGSZ, NAMES, make_bundle
from tests.unit.runtime.test_switch import files_of_at_most
from yolo_compress.bundle import keys, make
from yolo_compress.bundle.io_contract import check_signatures
from yolo_compress.bundle.keys import keygen, read_seed
from yolo_compress.bundle.targets import registry
from yolo_compress.cli.main import main
from yolo_compress.errors import GateFailed, RecipeError, StorageError
from yolo_compress.runtime.secure import ed25519
from yolo_compress.runtime.secure.signed_manifest import verify
from yolo_compress.runtime.secure.unpack import unpack

CODE_KIB = 480  # size limit of a bundle without models and golden images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def test_a_bundle_without_models_and_golden_images_is_small(bundle: Path) -> None:
    files = [file for file in bundle.rglob("*") if file.is_file() and file.parent.name not in ("onnx", "golden")]
    assert sum(file.stat().st_size for file in files) + len(make.README) <= (CODE_KIB - 2) * 1024, (
        "2 for a target's own"
    )


def test_all_of_its_code_is_python_38(bundle: Path) -> None:
    files = sorted(bundle.rglob("*.py"))
    assert {file.name for file in files} >= {"build.py", "command_line.py", "signed_manifest.py", "switch.py"}
    for file in files:
        assert newer_than_38(ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))) == set(), file


def test_the_program_for_coreml_packages_stays_out(bundle: Path) -> None:
    commands = {file.name for file in (bundle / "runtime" / "commands").iterdir()}
    assert "coreml.py" not in commands and {f"{name}.py" for name in make.COMMANDS} <= commands


def test_the_launchers_start(bundle: Path) -> None:
    for command in make.COMMANDS:
        done = subprocess.run(
            [sys.executable, bundle / f"{command}.py", "--help"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("usage: ")
    assert verify(bundle)["name"] == "tiny", "and leave nothing behind"


def started(bundle: Path, command: str, before: str) -> tuple[int, str]:
    """Return exit code and stderr of a command that runs after the Python lines `before`."""
    program = f"import runpy, sys\n{before}\nsys.path.insert(0, {str(bundle)!r})\nsys.argv = ['x', '--help']\n"
    words = [sys.executable, "-I", "-c", f"{program}runpy.run_path({str(bundle / command)!r}, run_name='__main__')"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


NO_NUMPY = "sys.modules['numpy'] = None"  # import numpy: ModuleNotFoundError


@pytest.mark.fault(88)
@pytest.mark.parametrize("version", [(2, 7, 18), (3, 6, 9), (3, 7, 16)])
def test_an_old_python_is_one_line(version: tuple[int, int, int], bundle: Path) -> None:
    old = "{}.{}".format(*version)
    registry.write("plain", bundle, {})
    try:
        for command in (*make.COMMANDS, "ros2_node"):
            source = (bundle / f"{command}.py").read_text()
            ast.parse(source, feature_version=(3, 4))  # and nothing that Python 2.7 does not know
            assert not re.search(r"\bf['\"]|\bnonlocal\b|\basync\b|->|print", source.split("\n", 3)[3])
            said = f"error: Python 3.8 or newer expected, this is {old}; start {command}.py with a newer one\n"
            assert started(bundle, f"{command}.py", f"sys.version_info = {version}") == (4, said)
    finally:
        (bundle / "ros2_node.py").unlink()


def test_a_missing_numpy_is_one_line(bundle: Path) -> None:
    for command in ("build", "bench", "detect"):
        code, said = started(bundle, f"{command}.py", NO_NUMPY)
        assert code == 4 and said.startswith("error: ") and said.count("\n") == 1
        assert f"; install numpy for {sys.executable}" in said
    assert started(bundle, "switch.py", NO_NUMPY) == (0, "")
    code, said = started(bundle, "detect.py", "sys.modules['runtime.detect.post'] = None")
    assert code == 1 and "Traceback" in said, "what is no fault of the robot's"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=there"], "there: exists already"),
        ([], "needs out"),
        (["out=new", "target=windows"], "target: got 'windows', expected plain, isaac_ros"),
        (["out=new", "version=-1"], "version: got '-1', expected a whole number"),
        (["out=new", "golden=0"], "golden: got '0'"),
        (["out=new", "key=gone"], "key=gone: No such file"),
        (["out=new", "key=there/note"], "no private key"),
        (["out=new", "engine=x"], "engine"),
    ],
)
def test_wrong_options_are_an_error_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note").write_text("no key")
    monkeypatch.setattr(make, "make", None)
    assert main(["bundle", "recipe=digits", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and not (tmp_path / "new").exists()


def test_versions_rise_by_themselves() -> None:
    first = make.order({"out": "/nowhere/a"})
    assert (
        first.version > 1.7e9
        and first.target == "plain"
        and first.seed is None
        and first.golden == 4
        and not first.force
    )


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", f"out={tmp_path / 'robot.key'}"]) == 0
    assert "pin_as" in json.loads(capsys.readouterr().out.splitlines()[-1])
    seed = read_seed(tmp_path / "robot.key")
    with pytest.raises(RecipeError, match="no private key"):
        read_seed(tmp_path / "robot.key.pub")
    assert stat.S_IMODE((tmp_path / "robot.key").stat().st_mode) == 0o600
    assert (tmp_path / "robot.key.pub").read_text().strip() == ed25519.public_key(seed).hex()
    with pytest.raises(RecipeError, match="locks out the robots"):
        keygen(tmp_path / "robot.key")
    keygen(tmp_path / "other.key")
    assert read_seed(tmp_path / "other.key") != seed


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o660, 0o644])
def test_a_private_key_that_others_can_read_gives_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: int
) -> None:
    key = tmp_path / "my robot.key"
    keygen(key)
    assert capsys.readouterr().err == ""
    key.chmod(mode)
    Path(f"{key}.pub").unlink()
    seed = make.order({"out": str(tmp_path / "b.tar"), "key": str(key)}).seed
    said = capsys.readouterr().err
    keygen(key)  # an earlier keygen was killed before it wrote the public key; the warning does not stop this one
    assert capsys.readouterr().err == said and seed == read_seed(key)
    if mode & 0o077:
        assert said.count("\n") == 1 and f"(mode {mode:o})" in said and said.endswith(f"chmod 600 '{key}'\n")
    else:
        assert said == ""


def test_keygen_that_was_killed_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "robot.key"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(keys, "atomic_write", killed)
        keygen(key)
    seed = read_seed(key)
    assert keygen(key)["public_key"] == f"{key}.pub" and read_seed(key) == seed
    assert (tmp_path / "robot.key.pub").read_text().strip() == ed25519.public_key(seed).hex()


def test_a_key_that_could_not_be_written_leaves_no_file(tmp_path: Path) -> None:
    with files_of_at_most(10), pytest.raises(StorageError, match=r"robot\.key: File too large"):
        keygen(tmp_path / "robot.key")
    assert not list(tmp_path.iterdir())
    (tmp_path / "robot.key").write_text("seed:12")  # cut short, as after a power cut
    with pytest.raises(RecipeError, match=r"is no private key; delete it"):
        keygen(tmp_path / "robot.key")


def report(passed: bool) -> Any:
    gate = {
        "passed": passed, "retention": 0.97, "min_retention": 0.98, "max_latency_ms": None, "max_size_mib": None,
        "tiers": {"95": True, "99": False, "99.9": False}, "checks": [], "reason": None if passed else "has 97 %",
    }  # fmt: skip
    return SimpleNamespace(metrics={"gate": gate, "verdict": {"line": "FAIL: INT8 has 97 %"}})


@pytest.mark.fault(42)
def test_a_failed_gate_makes_no_bundle_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    asked = make.order({"out": "/nowhere/a"})
    with pytest.raises(GateFailed, match=r"INT8 has 97 %; no bundle is made \(force=true"):
        make._gate(report(False), asked)
    forced = make._gate(report(False), make.order({"out": "/nowhere/a", "force": "true"}))
    assert forced["forced"] and not forced["passed"] and forced["reason"] and forced["tiers"]["95"]
    assert "forced: FAIL" in capsys.readouterr().err
    whole = make._gate(report(True), make.order({"out": "/nowhere/a", "force": "true"}))
    assert whole["passed"] and not whole["forced"]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_equal_files_give_equal_tars_with_all_of_them(
    ending: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for name, at in (("a", 1.0), ("b", 99.0)):
        (tmp_path / name).mkdir()
        out = tmp_path / f"{name}.{ending}"
        monkeypatch.setattr(time, "time", lambda at=at: at)
        make._publish(bundle, tmp_path / name, out)
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    with tarfile.open(out) as tar:
        assert {member.name.split("/")[0] for member in tar} == {"bundle"}
        assert {(member.uid, member.mtime, member.uname) for member in tar} == {(0, 0, "")}
    assert verify(unpack(out, tmp_path / "out"))["files"] == verify(bundle)["files"]


@pytest.mark.fault(91)
def test_only_unfinished_bundles_of_killed_calls_are_removed(tmp_path: Path) -> None:
    left, used = tmp_path / f"{make.PARTIAL}0-a.tar", tmp_path / f"{make.PARTIAL}1-a.tar"
    others = [tmp_path / name for name in ("a", ".tmp-0123abcd-a", "b.tar")]
    for folder in (left / "a", used / "a", *others):
        folder.mkdir(parents=True)
    link = tmp_path / f"{make.PARTIAL}2-a.tar"
    link.symlink_to(others[0])
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with make._marked(used):
            os.write(tell, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    try:
        make._sweep(tmp_path)
        assert set(tmp_path.iterdir()) == {used, link, *others} and (used / "a").is_dir()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)
    make._sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {link, *others}
    make._sweep(tmp_path / "nowhere")


def test_models_with_different_inputs_or_outputs_make_no_bundle(bundle: Path, tmp_path: Path) -> None:
    file = bundle / "onnx" / "fp32.onnx"
    check_signatures([file, file], IMGSZ, len(NAMES))
    with pytest.raises(GateFailed, match=r"images \[B, 3, 64, 64\]"):
        check_signatures([file], (64, 64), len(NAMES))
    with pytest.raises(GateFailed, match=r"output0 \[B, 84, anchors\]"):
        check_signatures([file], IMGSZ, 80)
    network = onnx.load(str(file))
    network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(network, str(tmp_path / "int8.onnx"))
    with pytest.raises(GateFailed, match=r"int8\.onnx: input and output"):
        check_signatures([file, tmp_path / "int8.onnx"], IMGSZ, len(NAMES))
