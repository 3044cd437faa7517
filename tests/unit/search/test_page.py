"""The report of a study: the table of the front, the chart, the recipe of the chosen engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import toy_study as toy
from tests.support.toy_study import instant
from yolo_compress.recipe import recipe
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.search import page
from yolo_compress.search.study import failed, write_outcome


@pytest.fixture
def written(home: Path) -> page.SearchDocument:
    study = toy.study(home, "toy", ("search.max_drop", "0.045"))
    instant(study).run()
    last = study.trials()[-1]
    write_outcome(last.folder, failed("no <b>memory</b>", "cut"))
    return page.write(study)


def test_the_document_agrees_with_its_files(home: Path, written: page.SearchDocument) -> None:
    folder = home / "searches" / "toy"
    assert json.loads((folder / "report.json").read_text()) == written
    assert written["counts"] == {"done": 11, "stopped": 0, "failed": 1, "open": 0} and written["planned"] == 12
    (best,) = (row for row in written["engines"] if row["chosen"])
    able = [row for row in written["engines"] if row["cost"] <= 4]
    assert written["verdict"] == "unproven" and best["low"] == max(row["low"] or 0 for row in able)
    assert best["front"] and best["point"]["keep_flops"] == pytest.approx(best["cost"] / 10)


def test_the_chosen_recipe_is_the_trials(home: Path, written: page.SearchDocument) -> None:
    (best,) = (row for row in written["engines"] if row["chosen"])
    chosen = recipe.load(home / "searches" / "toy" / "toy-chosen.yaml")
    assert chosen.prune and chosen.prune.keep_flops == best["point"]["keep_flops"] and chosen.search is None
    assert written["command"] == f"yolo-compress run recipe={home}/searches/toy/toy-chosen.yaml"


def test_two_studies_have_chosen_recipes_of_two_names(home: Path) -> None:
    """The name of a recipe is that of its links in `weights/`, which `gc` keeps artefacts for."""
    names = set()
    for study in (toy.study(home, name, ("search.trials", "1")) for name in ("toy", "other")):
        instant(study).run()
        page.write(study)
        (file,) = study.folder.glob("*chosen.yaml")
        names.add(recipe.load(file).name)
    assert names == {"toy-chosen", "other-chosen"}


def test_the_page_shows_front_trials_and_failures_and_escapes_them(home: Path, written: page.SearchDocument) -> None:
    html = (home / "searches" / "toy" / "report.html").read_text()
    assert html.count("<svg") == 2 and "<script" not in html and "no &lt;b&gt;memory&lt;/b&gt;" in html
    for row in written["engines"]:
        assert (f"trial {row['trial']} int8" in html) == (row["front"] and row["trial"] is not None)
    assert "12 trials" in html and "baseline int8" in html
    markdown = (home / "searches" / "toy" / "report.md").read_text()
    assert "| trial" in markdown and "```sh\nyolo-compress run recipe=" in markdown


def test_the_text_for_a_terminal(home: Path, written: page.SearchDocument) -> None:
    shown = page.text(written)
    assert shown.startswith("UNPROVEN: trial") and "12 of 12 trials ended (11 done, 1 failed) in" in shown
    assert max(map(len, shown.split("\n\n")[2].splitlines())) <= page.WIDTH
    assert f"Latencies are those of {cpu_model()}." in (home / "searches" / "toy" / "report.md").read_text()


def test_a_baseline_that_meets_the_goal_is_the_chosen_recipe(home: Path) -> None:
    study = toy.study(home, "toy", ("search.latency_ms", "11"), ("search.max_drop", "0.05"))
    instant(study).run()
    found = page.write(study)
    chosen = recipe.load(home / "searches" / "toy" / "toy-chosen.yaml")
    assert found["verdict"] == "dense" and found["engines"][0]["chosen"] and found["command"]
    assert chosen.prune is chosen.distill is None and chosen.qat and chosen.qat.epochs == 0
    assert "REACHED" in (home / "searches" / "toy" / "report.html").read_text()


def test_a_study_without_results(home: Path) -> None:
    found = page.write(toy.study(home))
    assert found["engines"] == [] and found["command"] is None and not (home / "searches/toy/toy-chosen.yaml").exists()
