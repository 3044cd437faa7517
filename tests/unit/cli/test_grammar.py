"""The command line's grammar: every accepted form means the same, every wrong one says what to write (faults 1, 6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolo_compress.cli import grammar, helptext
from yolo_compress.cli.grammar import Command, parse
from yolo_compress.cli.stage import file_list
from yolo_compress.cli.verbs import VERBS, Option, Verb
from yolo_compress.errors import RecipeError
from yolo_compress.recipe import recipe

KEEP = (("prune.keep_flops", "0.6"),)


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=digits", "prune.keep_flops=0.6"],
        ["--recipe", "digits", "--prune.keep_flops", "0.6"],
        ["--recipe=digits", "--prune.keep_flops=0.6"],
        ["--prune.keep_flops=0.6", "recipe=digits"],
    ],
)
def test_forms_mean_the_same(words: list[str]) -> None:
    assert parse(["prune", *words]) == Command("prune", "digits", KEEP)


def test_defaults() -> None:
    command = parse(["engine"])
    assert command == Command("engine", "custom") and command.wait and not command.force
    assert grammar.DEFAULT_RECIPE in recipe.names()


@pytest.mark.parametrize("words", [["force=true"], ["--force"], ["--force", "true"], ["--force=true"]])
def test_force(words: list[str]) -> None:
    command = parse(["qat", *words, "qat.epochs=2", "lock=fail"])
    assert command.force and not command.wait and command.overrides == (("qat.epochs", "2"),)


def test_force_false() -> None:
    assert not parse(["qat", "--force", "false"]).force


def test_values_may_hold_anything() -> None:
    values = ["a b", "é🙂", "a=b=c", "-x", "--y", "", "$(rm -rf .)", "new\nline", "'q'", "x" * 5000]
    for value in values:
        assert parse(["run", f"data.yaml={value}"]).overrides == (("data.yaml", value),)
    assert parse(["run", "--data.yaml", "-x.yaml"]).overrides == (("data.yaml", "-x.yaml"),)
    assert parse(["run", "recipe=-x.yaml"]).recipe == "-x.yaml"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["keygen", "out="], "out is empty; give out=FILE, or leave it out"),
        (["predict", "source=a", "engine=b", "--out", ""], "out is empty; give out=FOLDER"),
        (["lint", "a\0.onnx"], "holds a NUL character"),
        (["run", "data.yaml=a\0"], "holds a NUL character"),
        (["\0"], "holds a NUL character"),
    ],
)
def test_options_and_words_that_nothing_can_be_named_by(argv: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse(argv)
    assert str(caught.value).isprintable()


def test_sections_can_be_dropped() -> None:
    assert parse(["run", "sparsify=null"]).overrides == (("sparsify", "null"),)
    assert parse(["run", "engine=null"]).overrides == (("engine", "null"),), "for predict it is an option"


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"]])
def test_help(argv: list[str]) -> None:
    assert parse(argv) == Command("help")


@pytest.mark.parametrize("argv", [["prune", "--help"], ["prune", "x=1", "-h"], ["help", "prune"], ["-h", "prune"]])
def test_help_of_a_verb(argv: list[str]) -> None:
    assert parse(argv) == Command("help", words=("prune",))


def test_version_and_fetch() -> None:
    assert parse(["--version"]).verb == "version"
    assert parse(["fetch", "yolov8l.pt", "coco128"]).words == ("yolov8l.pt", "coco128")
    assert parse(["lint", "a.onnx", "target=openvino"]) == Command(
        "lint", options={"target": "openvino"}, words=("a.onnx",)
    )


@pytest.mark.parametrize("argv", [["help", "prune", "--all"], ["prune", "--help", "--all"], ["help", "--all", "prune"]])
def test_help_with_the_advanced_knobs(argv: list[str]) -> None:
    assert parse(argv) == Command("help", options={"all": "true"}, words=("prune",))
    assert parse(["help", "--all"]) == parse(["--help", "all=true"]) == Command("help", options={"all": "true"})


def test_every_section_has_a_help_of_its_own() -> None:
    assert set(recipe.SECTIONS) - {"data"} <= set(VERBS)
    for section in recipe.SECTIONS:
        assert parse(["help", section]).words == (section,)


def test_an_option_may_have_the_name_of_a_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its verb it is an option; for every other verb it is still the knob."""
    option = Option("data.yaml", "FILE", "Data set.", values="a file", needed=True)
    monkeypatch.setitem(
        VERBS, "start", Verb("start", "write a recipe", "The chain", "none:none", (option,), knobs=False)
    )
    assert parse(["start", "data.yaml=d.yaml"]) == Command("start", options={"data.yaml": "d.yaml"})
    assert parse(["run", "data.yaml=d.yaml"]).overrides == (("data.yaml", "d.yaml"),)
    assert parse(["run", "--data.yaml", "d.yaml"]).overrides == (("data.yaml", "d.yaml"),)
    with pytest.raises(RecipeError, match=r"start needs data.yaml; usage: yolo-compress start data.yaml=FILE$"):
        parse(["start"])


def test_usage_follows_the_verb() -> None:
    assert VERBS["fetch"].usage == "usage: yolo-compress fetch NAME ..."
    assert VERBS["help"].usage == "usage: yolo-compress help [VERB|SECTION] [--all]"
    assert VERBS["lint"].usage == "usage: yolo-compress lint FILE.onnx [target=NAME]"
    assert VERBS["predict"].usage == (
        "usage: yolo-compress predict source=IMAGE|FOLDER|VIDEO|CAMERA engine=FOLDER [out=FOLDER] [draw=true] "
        "[conf=0.25] [iou=0.7] [engines=N]"
    )
    assert VERBS["status"].usage == "usage: yolo-compress status [recipe=NAME|FILE] [section.key=value ...]"


WRONG = {
    ("prnue",): "unknown verb 'prnue', did you mean prune?",
    ("xyzzy",): "unknown verb 'xyzzy'; verbs are init, run, teacher, baseline",
    ("recipe=digits", "prune"): "the verb comes first, got 'recipe=digits'",
    ("--recipe", "digits"): "the verb comes first, got '--recipe'",
    ("help", "prune", "--al"): "--al needs a value",
    ("prune", "--all"): "prune takes no all",
    ("report", "out=r"): "out needs add; give both or neither; usage: yolo-compress report",
    (
        "help",
        "prune",
        "qat",
    ): "help takes at most one verb or section, got 2; usage: yolo-compress help [VERB|SECTION] [--all]",
    ("run", "epoch=10"): "epoch: unknown key, did you mean epochs?",
    ("run", "--epoch", "10"): "epoch: unknown key, did you mean epochs?",
    ("run", "--epoch"): "epoch: unknown key, did you mean epochs?",
    ("qat", "qat.epoch=10"): "qat.epoch: unknown key, did you mean epochs?",
    ("run", "recip=digits"): "recip: unknown key, did you mean recipe?",
    ("run", "lok=fail"): "lok: unknown key, did you mean lock?",
    ("run", "lock=never"): "lock: got 'never', expected wait or fail",
    ("run", "force=yes"): "force: got 'yes', expected true or false",
    ("run", "--force", "yes"): "'yes' is out of place; expected key=value or --key value",
    ("run", "recipe=a", "recipe=b"): "recipe is given twice: 'a' and 'b'",
    ("run", "qat.epochs=2", "--qat.epochs", "3"): "qat.epochs is given twice: '2' and '3'; give it once",
    ("run", "--qat.epochs"): "--qat.epochs needs a value: --qat.epochs VALUE, or qat.epochs=VALUE",
    ("run", "--recipe", "--force"): "--recipe needs a value",
    ("prune", "qat"): "expected one verb, got prune and qat; a stage also runs the stages it needs",
    ("run", "my.yaml"): "'my.yaml' is out of place",
    ("run", "new\nline"): "out of place",
    ("run", "=1"): "out of place",
    ("run", "--"): "unknown key",
    ("run", "--=1"): "out of place",
    ("status", "lock=fail"): "status takes no lock",
    ("status", "study=a"): "status takes no study, an option of search; usage: yolo-compress status",
    ("fetch",): "fetch takes one or more names, got 0; usage: yolo-compress fetch NAME",
    ("fetch", "qat.epochs=1"): "fetch takes no 'qat.epochs'",
    ("fetch", "x.pt", "recipe=a"): "fetch takes no recipe",
    ("fetch", "x.pt", "force=true"): "fetch takes no force",
    ("version", "x"): "'x' is out of place",
    ("lint",): "lint takes one file, got 0; usage: yolo-compress lint FILE.onnx [target=NAME]",
    ("lint", "a.onnx", "b.onnx"): "lint takes one file, got 2",
    ("lint", "a.onnx", "qat.epochs=1"): "lint takes no 'qat.epochs'",
    ("qat", "target=openvino"): "qat takes no target",
    ("predict", "source=a.jpg"): "predict needs engine; usage: yolo-compress predict source=",
    ("predict", "a.jpg"): "predict needs source and engine",
    ("predict", "source=a.jpg", "engine=e", "b.jpg"): "'b.jpg' is out of place",
    ("predict", "source=a.jpg", "engine=e", "qat.epochs=1"): "predict takes no 'qat.epochs'",
    ("predict", "source=a.jpg", "engine=e", "draw=yes"): "draw: got 'yes', expected true or false",
    ("qat", "source=a.jpg"): "qat takes no source",
    ("ab", "a=x.pt", "b=y.pt"): "ab needs data; usage: yolo-compress ab a=MODEL b=MODEL data=",
    ("qat", "seed=1"): "seed: unknown key, did you mean",
    ("qat", "a=x.pt"): "qat takes no a",
}


@pytest.mark.parametrize("argv", WRONG, ids=lambda argv: ascii(" ".join(argv)))
def test_wrong_command_lines(argv: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(argv)
    message = str(caught.value)
    assert message.startswith("command line: ") and WRONG[argv] in message and "\n" not in message
    assert caught.value.exit_code == 2


def test_a_list_of_files_keeps_a_name_with_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "left,right.json", "left,right,b.json"):
        Path(name).write_text("{}")
    for text, names in {
        "a.json": ["a.json"],
        "a.json,b.json": ["a.json", "b.json"],
        "left,right.json": ["left,right.json"],
        "a.json,left,right.json,b.json": ["a.json", "left,right.json", "b.json"],
        "left,right,b.json": ["left,right,b.json"],
        "a.json,,gone,b.json,": ["a.json", "gone", "b.json"],
        "x" * 300 + ",a.json": ["x" * 300, "a.json"],
        "": [],
    }.items():
        assert list(map(str, file_list(text))) == names


@pytest.mark.parametrize(("word", "meant"), [("prnue", "prune"), ("dat", "data")])
def test_help_of_an_unknown_word_says_which_was_probably_meant(word: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"^command line: unknown verb '{word}', did you mean {meant}\\?$"):
        helptext.handle(parse(["help", word]))
