"""Two recipe files with one name: each has its own folder of links, in any order and at any path."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_chain import RECIPE, Chain, fake_chain
from yolo_compress import pipeline
from yolo_compress.cli.main import main
from yolo_compress.recipe import folder as recipe_folder
from yolo_compress.recipe import recipe
from yolo_compress.status import status
from yolo_compress.store.manifest import Artifact


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with fake_chain(tmp_path) as made:
        yield made


def run(folder: str, epochs: int, target: str = "report") -> Artifact:
    """Write `folder/r.yaml` with this number of epochs, and run it up to `target`."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "r.yaml").write_text(RECIPE.replace("prune: {epochs: 2}", f"prune: {{epochs: {epochs}}}"))
    return pipeline.run(recipe.load(Path(folder, "r.yaml")), target)


def links(name: str) -> dict[str, Path]:
    return {link.name: link.resolve() for link in Path("weights", name).iterdir() if link.is_symlink()}


def test_each_of_two_files_of_one_name_has_its_own_links(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("a", 2)
    assert links("r")["report"] == first.path.resolve()
    before = links("r")
    capsys.readouterr()
    second = run("b", 3, "prune")
    name = recipe_folder.label(Path("weights"), recipe.load(Path("b/r.yaml")))
    messages = [line for line in capsys.readouterr().err.splitlines() if "another recipe" in line]
    assert messages == [
        "weights/r leads to the results of another recipe of this name (a/r.yaml); the results of this one are in "
        f"weights/{name}"
    ]
    assert links("r") == before and links(name)["prune"] == second.path.resolve()
    assert set(links(name)) == {"baseline", "prune"}, "no result of the other"
    states = {row.stage: (row.state, row.why) for row in status(recipe.load(Path("b/r.yaml")))}
    assert states["prune"][0] == "up to date" and states["report"] == ("missing", ())
    assert run("a", 2) == first and links("r") == before
    assert main(["gc"]) == 0 and first.path.is_dir() and second.path.is_dir()


def test_a_shipped_recipe_and_a_file_of_its_name(chain: Chain) -> None:
    shipped = recipe.load("digits")
    recipe_folder.claim(Path("weights"), shipped)
    Path("digits.yaml").write_text(RECIPE)
    own = recipe.load("digits.yaml")
    assert recipe_folder.label(Path("weights"), shipped) == "digits"
    assert recipe_folder.label(Path("weights"), own).startswith("digits~")


def test_a_file_that_moved_keeps_its_folder(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    run("a", 2)
    shutil.move("a", "moved")
    run("moved", 2)
    Path("linked").symlink_to("moved")
    assert recipe_folder.label(Path("weights"), recipe.load(Path("linked/r.yaml"))) == "r", "the same file by a link"
    run("b", 3, "baseline")
    shutil.rmtree("moved")
    assert recipe_folder.label(Path("weights"), recipe.load(Path("b/r.yaml"))) != "r", (
        "a folder with results of another recipe stays that recipe's"
    )


def test_the_working_folder_can_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/r.yaml").write_text(RECIPE)
    for folder in ("one", "two"):
        if folder == "two":
            shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
        monkeypatch.chdir(tmp_path / folder)
        here = recipe.load("r.yaml")
        assert recipe_folder.label(Path("weights"), here) == "r"
        recipe_folder.claim(Path("weights"), here)


def test_recipes_from_different_files_can_be_equal(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.yaml").write_text(RECIPE)
    one, two = (recipe.load(tmp_path / folder / "r.yaml") for folder in ("a", "b"))
    assert one == two and one.source != two.source and one.dump() == two.dump()
    assert one != recipe.load(tmp_path / "b/r.yaml", [("run.seed", "1")])
    assert one.replaced({}).source == one.source
