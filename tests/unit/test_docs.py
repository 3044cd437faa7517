"""README and docs: short lines, links that lead somewhere, and no knob, verb, code or message that the product does not have."""

from __future__ import annotations

import ast
import errno
import os
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT, anchors, blocks, commands, prose
from yolo_compress import errors, exits
from yolo_compress.cli import grammar
from yolo_compress.recipe import recipe

README, DOCS = PAGES[0], PAGES[1:]
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
each_text = pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FILES = ("html", "json", "md", "png", "py", "pt", "csv", "onnx", "pub", "key", "tar")  # `report.json` is no knob


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_readme_is_one_screen_and_a_table_of_pages() -> None:
    assert len(text(README).split()) <= 900
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", text(README)))
    assert linked == {f"docs/{page.name}" for page in DOCS}


@each_text
def test_lines_paragraphs_and_tables_are_short(page: Path) -> None:
    long = [f"{number}: {line}" for number, line in enumerate(text(page).splitlines(), 1) if len(line) > 120]
    assert not long
    for part in prose(page):
        if not part[0].startswith("|"):
            assert len(part) <= 5, "\n".join(part)
        elif page.name != "glossary.md":
            assert len(part) <= 20, part[0]


@each_text
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def named_knobs(page: Path) -> set[str]:
    sections = "|".join(recipe.SECTIONS)
    found = re.findall(rf"(?<![\w./-])((?:{sections})\.([a-z]\w*))(?![\w/])", text(page))
    return {knob for knob, key in found if key not in FILES}


@each_page
def test_every_knob_named_exists(page: Path) -> None:
    assert named_knobs(page) <= set(recipe.options())


def test_every_verb_and_recipe_is_documented() -> None:
    everything = "\n".join(map(text, PAGES))
    for name in [*grammar.VERBS, *recipe.names()]:
        assert re.search(rf"yolo-compress {name}\b|`{name}`", everything), name


def test_the_changelog_has_the_usual_headings_in_order() -> None:
    page = text(ROOT / "CHANGELOG.md")
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    usual = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    versions = len(re.findall(r"^## \d", page, re.MULTILINE))
    assert versions >= 1 and set(headings) <= set(usual)
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        inside = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert inside == [name for name in usual if name in inside]


def test_contributing_names_make_targets_that_exist() -> None:
    """In CONTRIBUTING and the templates of issues and pull requests."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (ROOT / "CONTRIBUTING.md", *(ROOT / ".github").rglob("*.md")):
        named = {name for part in re.findall(r"`make ([a-z -]+)`", text(page)) for name in part.split()}
        assert named <= targets, page.name
        verbs = set(re.findall(r"yolo-compress ([a-z]+)", text(page)))
        assert verbs <= set(grammar.VERBS), page.name


def test_every_variable_is_documented_and_no_other() -> None:
    make = set(re.findall(r"^([A-Z_]+)\s*\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"PYTHON", "VENV"}
    read = {name for file in sources() for name in re.findall(r"YOLO_COMPRESS_[A-Z_]+", file.read_text())}
    tested = {"YOLO_COMPRESS_CRASH_AT"}  # for the tests of the store
    there = (make | read) - tested
    tables = "".join(line for line in text(ROOT / "docs/recipes.md").splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([A-Z][A-Z_]+)`", tables)) == there


def test_every_exit_code_has_its_section() -> None:
    family = [errors.CompressError, *errors.CompressError.__subclasses__()]
    codes = {0, exits.BUG, exits.SIGINT, exits.SIGTERM, *(error.exit_code for error in family)}
    page = text(ROOT / "docs/troubleshooting.md")
    headings = re.findall(r"^## Exit codes? (.*)$", page, re.MULTILINE)
    assert {int(code) for heading in headings for code in re.findall(r"\d+", heading)} == codes
    assert {int(code) for code in re.findall(r"^\| \[(\d+)\]", page, re.MULTILINE)} == codes


@cache
def sources() -> tuple[Path, ...]:
    return tuple(sorted((ROOT / "yolo_compress").rglob("*.py")))


@cache
def printed() -> str:
    """Every text of the package, a placeholder of an f-string as a line break."""
    found = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (one.value if isinstance(one, ast.Constant) else "\n" for one in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def os_errors() -> set[str]:
    return {os.strerror(code) for code in errno.errorcode}


def messages() -> list[str]:
    """The messages of the troubleshooting page: what stands in backticks at the head of its items, but for names alone."""
    page = text(ROOT / "docs/troubleshooting.md").partition("## Without an error")[0]
    heads = re.findall(r"^- (.*?)\\$", page, re.MULTILINE)
    return [one for head in heads for one in re.findall(r"`([^`]+)`", head) if " " in one]


@pytest.mark.parametrize("message", messages())
def test_every_message_is_one_that_the_product_prints(message: str) -> None:
    """By its runs of words between what differs from case to case: names, numbers, paths, and the system's own words."""
    parts = re.split(r"\.\.\.|'[^']*'|\S*\d\S*|\S+\.(?:yaml|pt|tar)\b|\S+/\S*|\S+=\S+|[:;,()]", message)
    runs = [run for part in parts if len(run := part.strip(" .")) >= 5 and run not in os_errors()]
    assert runs or "Permission denied" in message or message in os_errors()
    for run in runs:
        assert run in printed(), f"{run!r} of {message!r}"


def test_every_page_has_what_can_be_run() -> None:
    """The tests of tests/pipeline/test_docs.py run it; none of it may hide in a block of another kind."""
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"sh", "console", "python", "yaml", "text"}
    assert sum(len(commands(page)) for page in PAGES) > 40


TREE = ROOT / "docs/architecture.md"


def tree() -> dict[str, bool]:
    """Paths of the tree of architecture.md, relative to the checkout, and whether each is a folder."""
    (block,) = blocks(TREE, "text")
    found: dict[str, bool] = {}
    folders: list[str] = []  # by depth
    for line in block.text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for word in line.split():
            if not (match := re.fullmatch(r"([\w.]+)(/|\.py)", word)):
                break  # the description begins
            path = "/".join([*folders[:depth], word.rstrip("/")])
            assert path not in found, f"{path} stands there twice"
            found[path] = match[2] == "/"
            if match[2] == "/":
                folders[depth:] = [word.rstrip("/")]
    return found


def test_the_tree_of_the_architecture_is_the_real_one() -> None:
    for path, folder in tree().items():
        assert (ROOT / path).is_dir() if folder else (ROOT / path).is_file(), path
    packages = {file.parent.relative_to(ROOT).as_posix() for file in sources() if file.name == "__init__.py"}
    tests = {
        folder.relative_to(ROOT).as_posix() for folder in (ROOT / "tests").iterdir() if (folder / "x").parent.is_dir()
    }
    tests = {name for name in tests if not name.endswith("__pycache__")}
    assert {path for path, folder in tree().items() if folder} >= packages | tests
    top = {file.relative_to(ROOT).as_posix() for file in (ROOT / "yolo_compress").glob("*.py")}
    assert tree().keys() >= top, "every module at the root of the package is described"


@each_text
def test_files_and_modules_named_exist(page: Path) -> None:
    """`yolo_compress/...`, `tests/...` and `benchmarks/...` are files of the checkout; `yolo_compress.a.b` is a module or its name."""
    for path in re.findall(
        r"(?<![\w./-])((?:yolo_compress|tests|benchmarks|examples|scripts)/[\w./]*\w/?)", text(page)
    ):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").is_file() or "<" in path, path
    tests = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(test_\w+)`", text(page))) <= tests
    named = re.sub(
        r"^```text\n.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL
    )  # a text may name a file to be made
    for dotted in re.findall(r"(?<![\w./-])(yolo_compress(?:\.[a-z_]\w*)+)", named):
        parts = dotted.split(".")
        there = [n for n in range(len(parts), 0, -1) if _module(parts[:n])]
        assert there and there[0] >= len(parts) - 1, dotted
        if there[0] < len(parts):
            assert re.search(rf"\b{parts[-1]}\b", (_module(parts[:-1]) or ROOT).read_text(encoding="utf-8")), dotted


def _module(parts: list[str]) -> Path | None:
    place = ROOT.joinpath(*parts)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def glossary() -> list[str]:
    return re.findall(r"^\| (.+?) \| .+ \|$", text(ROOT / "docs/glossary.md"), re.MULTILINE)[1:]


def test_the_glossary_is_sorted_and_its_words_are_used() -> None:
    words = glossary()
    assert len(words) > 50 and words == sorted(set(words), key=str.lower)
    others = "\n".join(text(page).lower() for page in PAGES if page.name != "glossary.md")
    unused = [one for word in words for one in word.split(", ") if one.lower() not in others]
    assert not unused


# Words that the glossary has another word for, or that say nothing: see "How we write" in docs/style.md.
AVOIDED = r"\b(original|parent|dense|pictures?|vouch\w*|whom|nets?|amax|worth|said|told)\b"


OLD_WORDS = ("style.md",)  # it lists them


@pytest.mark.parametrize(
    "page", [one for one in [*PAGES, *OTHERS] if one.name not in OLD_WORDS], ids=lambda page: page.name
)
def test_one_word_a_thing(page: Path) -> None:
    """In prose: names of folders, knobs and columns are as they are, and a network of computers is one."""
    plain = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text(page), flags=re.MULTILINE | re.DOTALL)
    found = [line.strip() for line in plain.splitlines() if re.search(AVOIDED, line)]
    assert not found
