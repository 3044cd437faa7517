"""A verb needs one row in `cli.verbs` and a file with its handler. Nothing else lists verbs, their options or their words."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.pages import ROOT, blocks
from yolo_compress.cli import grammar, main, verbs
from yolo_compress.cli.helptext import help_text
from yolo_compress.cli.verbs import RECIPE, VERBS, Option, Verb, Words
from yolo_compress.lint.targets import TARGETS
from yolo_compress.progress import result
from yolo_compress.train import checkpoint

CLI = Path(verbs.__file__).parent
# Modules of cli/ without a handler.
PARTS = {"__init__", "estimate", "grammar", "init_targets", "main", "processes", "verbs"}


@pytest.fixture
def greet(monkeypatch: pytest.MonkeyPatch) -> Verb:
    """A verb that is added as a row. Its handler prints its arguments."""
    module = ModuleType("scratch_greet")

    def handle(command: grammar.Command) -> int:
        result(json.dumps([command.words, command.options, command.recipe, command.overrides]))
        return 1

    module.handle = handle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scratch_greet", module)
    row = Verb(
        "greet",
        "say hello to a robot",
        "Robots",
        "scratch_greet:handle",
        (
            RECIPE,
            Option("loud", "true", "Say it loudly.", "false", choices=verbs.SWITCH),
            Option("times", "N", "How often.", "1", "a whole number >= 1", "greetings"),
            Option("pause", "S", "Time between two.", "1", "a number", "s", requires="times"),
            Option("log", "FILE", "Where to note it.", values="a file", needed=True, writes=True),
        ),
        Words("ROBOT ...", "robot", "Whom to greet.", "names of robots", most=None),
    )
    monkeypatch.setitem(VERBS, "greet", row)
    return row


def test_a_row_is_in_the_help(greet: Verb) -> None:
    assert "\n  greet     say hello to a robot\n" in help_text()
    page = help_text("greet")
    assert page.startswith("yolo-compress greet: say hello to a robot\n")
    usage = "greet ROBOT ... [recipe=NAME|FILE] [section.key=value ...] [loud=true] [times=N] [pause=S] log=FILE"
    assert f"usage: yolo-compress {usage}" in " ".join(page.split())
    assert "\n  times        default 1; a whole number >= 1; unit: greetings\n      How often.\n" in page
    assert "\n  ROBOT ...    required; names of robots\n" in page and "\n  log          required; a file\n" in page
    assert "\n  section.key  " in page


def test_a_row_is_parsed_and_runs(greet: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(tmp_path / "log")
    words = ["greet", "ada", "--loud", "times=2", "bob", "--log", log, "recipe=digits", "qat.epochs=2"]
    assert main.main(words) == 1
    given = {"loud": "true", "times": "2", "log": log}
    assert json.loads(capsys.readouterr().out) == [["ada", "bob"], given, "digits", [["qat.epochs", "2"]]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ada"], "greet needs log; usage: yolo-compress greet ROBOT ..."),
        (["log=x"], "greet takes one or more robots, got 0"),
        (["ada", "log=x", "loud=very"], "loud: got 'very', expected true or false"),
        (["ada", "log=x", "pause=2"], "pause needs times; give both or neither"),
        (["ada", "log=x", "engines=2"], "greet takes no engines"),
        (["ada", "log=x", "tims=2"], "tims: unknown key, did you mean times?"),
        (["ada", "log=weights/store/bench-0123456789abcdef/x"], "log"),
    ],
)
def test_a_row_refuses(
    greet: Verb,
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "weights/store/bench-0123456789abcdef").mkdir(parents=True)
    monkeypatch.setenv("YOLO_COMPRESS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main.main(["greet", *words]) == 2
    out, err = capsys.readouterr()
    assert says in err and not out


def test_a_misspelt_verb_gets_a_suggestion(greet: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["gret"]) == 2
    assert "unknown verb 'gret', did you mean greet?" in capsys.readouterr().err
    assert main.main(["help", "greet"]) == 0
    assert capsys.readouterr().out.startswith("yolo-compress greet: ")


def test_the_example_of_the_docs_is_a_verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """The test runs the row and the handler of docs/extending.md."""
    page = ROOT / "docs/extending.md"
    (row_text,) = [block.text for block in blocks(page, "text") if block.text.startswith("Verb(")]
    (code,) = [block.text for block in blocks(page, "python") if "def handle(command" in block.text]
    row = eval(row_text.rstrip().rstrip(","), vars(verbs))
    module = ModuleType("yolo_compress.cli.widths")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(VERBS, row.name, row)
    checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", ["bolt", "nut"], 3, seed=0), tmp_path / "n.pt")
    assert main.main(["widths", str(tmp_path / "n.pt"), "least=256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    deepest = ("7.conv", "8.cv1.conv", "8.cv2.conv", "9.cv2.conv", "21.cv1.conv", "21.cv2.conv")  # of YOLOv8n
    assert json.loads(lines[-1]) == {f"model.{name}": 256 for name in deepest} and len(lines) == 7
    assert f"\n  {row.name:<10}{row.help}\n" in help_text()


@pytest.mark.parametrize("name", VERBS)
def test_every_row_names_a_handler_of_its_own_file(name: str) -> None:
    row = VERBS[name]
    assert row.name == name
    found = main.handler(row)
    assert [parameter.annotation for parameter in inspect.signature(found).parameters.values()] == ["Command"]
    assert found.__doc__ and Path(inspect.getfile(found)).parent == CLI


def test_every_file_of_the_command_line_belongs_to_a_row() -> None:
    handled = {row.handler.partition(":")[0].rpartition(".")[2] for row in VERBS.values()}
    assert {file.stem for file in CLI.glob("*.py")} == handled | PARTS


def test_options_of_a_verb_fit_together() -> None:
    for row in VERBS.values():
        names = [option.name for option in row.options]
        assert len(set(names)) == len(names)
        assert {option.requires for option in row.options} <= {"", *names}


def test_the_targets_of_lint_are_listed_once() -> None:
    option = VERBS["lint"].option("target")
    assert option and option.values == "one of " + ", ".join(TARGETS)
    source = (CLI / "verbs.py").read_text(encoding="utf-8")
    assert not [name for name in TARGETS if f'"{name}"' in source or f"{name}," in source]


def test_nothing_parses_a_help_text() -> None:
    """The parser and the help read the fields of rows, not usage lines or help texts."""
    for name in ("grammar", "helptext", "main", "verbs"):
        tree = ast.parse((CLI / f"{name}.py").read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "re" not in imported, name
    known = {
        node.value for node in ast.walk(ast.parse((CLI / "grammar.py").read_text())) if isinstance(node, ast.Constant)
    }
    assert known & set(VERBS) == {"help", "version"}, "of the flags --help and --version"
