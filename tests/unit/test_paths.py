"""A path is the file of that name, and no other: for Ultralytics, for make and for a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.noise_set import noise_set
from yolo_compress.data.dataset import load
from yolo_compress.errors import CompressError, CorruptArtifact, DataError, RecipeError
from yolo_compress.recipe import recipe
from yolo_compress.store.manifest import fix_hint
from yolo_compress.store.source_weights import find_weights
from yolo_compress.train import checkpoint, trainer
from yolo_compress.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["bolt", "nut"]
ODD = [
    "it's.pt",
    " n.pt",
    "n.pt ",
    "a b.pt",
    "Bob's run/n.pt",
    "n?.pt",
    "50%2F.pt",
    "é.pt",
    "yolov5n.pt",
    "n.ckpt",
    "-x.pt",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `0.pt` and `1.pt` of other weights."""
    folder = tmp_path_factory.mktemp("made")
    for seed in (0, 1):
        checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed), folder / f"{seed}.pt")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stem(path: Path) -> torch.Tensor:
    return checkpoint.load_model(path).model[0].conv.weight


@pytest.mark.fault(6, 75)
@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_of_any_name_is_loaded_and_no_namesake(made: Path, here: Path, name: str) -> None:
    file = Path(name)
    file.parent.mkdir(exist_ok=True)
    namesake = Path(name.strip().replace("'", ""))
    namesake.parent.mkdir(exist_ok=True)
    shutil.copy(made / "1.pt", namesake)
    shutil.copy(made / "0.pt", file)
    assert torch.equal(stem(file), stem(made / "0.pt")) and not torch.equal(stem(file), stem(made / "1.pt"))
    file.unlink()
    with pytest.raises(RecipeError, match="no such checkpoint"):
        checkpoint.load_model(file)


@pytest.mark.fault(75)
def test_a_damaged_official_checkpoint_is_reported_and_stays(made: Path, here: Path) -> None:
    Path("yolov8n.pt").write_bytes((made / "0.pt").read_bytes()[:5000])
    with pytest.raises(CorruptArtifact, match=r"yolov8n\.pt: not a loadable YOLO checkpoint"):
        checkpoint.load_model(Path("yolov8n.pt"))
    assert Path("yolov8n.pt").stat().st_size == 5000


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov8.yaml"])
def test_a_new_model_is_ultralytics_own_whatever_lies_here(here: Path, name: str) -> None:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    theirs = DetectionModel("yolov8n.yaml", ch=3, nc=2, verbose=False)
    Path(name).write_text("nc: 1\nbackbone: []\nhead: []\n")
    ours = checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0)
    assert ours.yaml == theirs.yaml
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.fault(6)
@pytest.mark.slow
def test_training_in_a_folder_of_any_name(here: Path) -> None:
    folder = here / "Bob's ru?n 50%"
    dataset = load(str(noise_set(folder, train=3, val=1)))
    settings = TrainSettings(epochs=1, batch=3, imgsz_px=64)
    trainer.train(checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0), dataset, settings, [], folder / "work", "t")
    assert (folder / "work/resume.pt").is_file()
    assert [path.name for path in here.iterdir()] == [folder.name]


FOLDERS = [
    "a b", "é 🤖", "new\nline", "tab\t", "\x1b[31m", "-x", "--force", "x" * 255, "é" * 127, "'; touch ran;'", "$(touch ran)", "%s{0}",
    "a#b", "C:\\x", os.fsdecode(b"\xff\xfe"), "/".join(["y" * 250] * 12),
]  # fmt: skip


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", FOLDERS, ids=ascii)
def test_data_and_weights_in_a_folder_of_any_name(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = noise_set(Path(name), train=2, val=1)
    dataset = load(str(yaml))
    assert len(dataset.train) == 2 and {sample.name for sample in dataset.train} == {
        "images/train/0.png",
        "images/train/1.png",
    }
    (Path(name) / "n.pt").touch()
    assert find_weights(f"{name}/n.pt") == Path(name) / "n.pt"
    assert [path.name for path in here.iterdir()] == [name.partition("/")[0]], "nothing ran"
    yaml.write_text("train: images/train\ntrain: images/val\n")
    with pytest.raises(DataError) as caught:
        load(str(yaml))
    assert str(caught.value).isprintable() and "duplicate key train" in str(caught.value)


IMPOSSIBLE = ["a/" * 3000 + "n", "x" * 300, "a\0b", "new\nline", "\x1b[31m", "\ud800"]


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", IMPOSSIBLE, ids=lambda name: ascii(name[:9]))
def test_a_path_that_cannot_be_is_one_line(here: Path, name: str) -> None:
    for call in (find_weights, load, recipe.load):
        with pytest.raises(CompressError) as caught:
            call(name)
        assert caught.value.exit_code in (2, 4) and str(caught.value).isprintable(), call


@pytest.mark.parametrize("name", ["plain", "it's", "a b", "$(touch ran)", "`touch ran`", '"'])
def test_the_command_that_an_error_names_removes_that_folder(here: Path, name: str) -> None:
    (here / name).mkdir()
    command = fix_hint(here / name).split("Delete it (")[1].rpartition(") and run")[0]
    subprocess.run(["sh", "-c", command], check=True)
    assert not list(here.iterdir())


# make

VALUES = [
    "it's.pt", "Bob's run/n.pt", "a b.pt", "$(touch ran)", "$$(touch ran)", "`touch ran`", "';touch ran;'", '";touch ran;"',
    "&& touch ran", "$(shell touch ran)", "$$(shell touch ran)", "${HOME}", "$HOME", "a;b|c>ran<d", "-x", "a\\b", "#x", "%", "*", "~",
]  # fmt: skip
VARIABLES = {
    "RECIPE": "recipe", "DATA": "data.yaml", "TEACHER": "teacher.weights", "STUDENT": "baseline.weights",
    "PRETRAINED": "baseline.pretrained", "TEACHER_PRETRAINED": "teacher.pretrained", "DEVICE": "run.device",
}  # fmt: skip


@pytest.fixture
def checkout(here: Path) -> Iterator[Path]:
    """The Makefile in a folder with an apostrophe, with a program that writes down its arguments in the place of ours."""
    folder = here / "Bob's checkout"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "scripts").mkdir()
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, folder)
    (folder / "scripts/setup.sh").write_text("#!/bin/sh\n")
    program = folder / ".venv/bin/yolo-compress"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen('argv', 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    for one in (program, folder / "scripts/setup.sh"):
        one.chmod(0o755)
    yield folder


def make(folder: Path, *words: str, code: int = 0, **environment: str) -> list[list[str]]:
    """What `make` ran, and that nothing else ran."""
    import json

    (folder / "argv").unlink(missing_ok=True)
    done = subprocess.run(
        ["make", *words], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert not (folder / "ran").exists(), "a value ran as a command"
    ran = (folder / "argv").read_text().splitlines() if (folder / "argv").exists() else []
    return [json.loads(line) for line in ran]


@pytest.mark.fault(6, 76)
@pytest.mark.parametrize("where", ["command line", "environment"])
@pytest.mark.parametrize("value", VALUES)
def test_make_passes_a_value_as_it_is(checkout: Path, value: str, where: str) -> None:
    given = {"STUDENT": value, "RECIPE": value}
    if where == "command line":
        (argv,) = make(checkout, "prune", *(f"{name}={text}" for name, text in given.items()))
    else:
        (argv,) = make(checkout, "prune", **given)
    assert argv == ["prune", f"recipe={value}", f"baseline.weights={value}"]


def test_make_passes_every_variable(checkout: Path) -> None:
    odd = "Bob's $(touch ran)/x"
    for name, key in VARIABLES.items():
        (argv,) = make(checkout, "status", f"{name}={odd}")
        assert f"{key}={odd}" in argv, name
    given = {"OUT": "out", "TARGET": "target", "KEY": "key", "VERSION": "version"}
    (argv,) = make(checkout, "bundle", *(f"{name}={odd}" for name in given))
    assert argv[2:] == [f"{key}={odd}" for key in given.values()]
    assert make(checkout, "bundle", "RECIPE=a b/it's.yaml")[0][2:] == ["out=bundle-it's"]
    assert make(checkout, "gc", f"RECIPE={odd}") == [["gc", f"recipe={odd}"]]


@pytest.mark.fault(76)
def test_make_splits_args_at_spaces_and_runs_nothing(checkout: Path) -> None:
    (argv,) = make(checkout, "all", "ARGS=qat.epochs=2 run.seed=$(touch ran) x=';touch ran;' y=$(shell touch ran)")
    assert argv[2:] == ["qat.epochs=2", "run.seed=$(touch", "ran)", "x=';touch", "ran;'", "y=$(shell", "touch", "ran)"]
    assert make(checkout, "demo", "ARGS=prune.epochs=1 `touch`") == [
        ["run", "recipe=digits", "prune.epochs=1", "`touch`"]
    ]


@pytest.mark.fault(76)
@pytest.mark.parametrize("name", [*VARIABLES, "OUT", "TARGET", "KEY", "VERSION", "VENV", "PYTHON"])
@pytest.mark.parametrize("words", [(), ("-i",), ("-k",)])
def test_make_refuses_a_line_break(checkout: Path, name: str, words: tuple[str, ...]) -> None:
    assert make(checkout, *words, "prune", f"{name}=a\ntouch ran", code=2) == []


def test_make_help_shows_no_value(checkout: Path) -> None:
    make(checkout, "help", "RECIPE=$(touch ran)`touch ran`\";touch ran;'")


def test_make_clean_stays_in_a_home_of_any_name(checkout: Path, tmp_path: Path) -> None:
    home = tmp_path / "Bob's home; touch ran"
    for folder in ("weights/store/x", "weights/digits", "datasets/digits"):
        (home / folder).mkdir(parents=True)
    (home / "weights/digits/prune").symlink_to("../store/x")
    (home / "weights/n.pt").touch()
    (tmp_path / "Bobs home").mkdir()
    make(checkout, "clean", YOLO_COMPRESS_HOME=str(home))
    assert {path.relative_to(home).as_posix() for path in home.rglob("*")} == {"weights", "weights/n.pt", "datasets"}
    assert (tmp_path / "Bobs home").is_dir()


def test_what_init_and_probe_print_can_be_pasted() -> None:
    from yolo_compress.cli.init import TARGETS

    words = {"recipe": "it's {x}.yaml", "name": "it's {x}", "weights": "my weights"}
    quoted = {key: shlex.quote(word) for key, word in words.items()}
    for target in TARGETS.values():
        for command in target.after:
            argv = shlex.split(command.format_map(quoted))
            assert any(words["recipe"] in word or words["name"] in word for word in argv)
