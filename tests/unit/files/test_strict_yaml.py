"""The strict YAML reader: valid and invalid files (faults 3, 4 and 5), and that it reads its own output back equal."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_compress.errors import DataError, RecipeError, StorageError
from yolo_compress.files import strict_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-.5", -0.5), ("3.", 3.0), ("12", 12), ("-3", -3), ("010", 10), ("0x1F", 31),
        ("0o17", 15), ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None), (".inf", math.inf),
        ("-.INF", -math.inf), ("no", "no"), ("on", "on"), ("1_000", "1_000"), ("12:30", "12:30"), ("nan", "nan"),
        ("2026-01-02", "2026-01-02"), ("384,640", "384,640"), ("1e", "1e"), ("<<", "<<"), ("9" * 500, math.inf),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, expected: object) -> None:
    value = strict_yaml.resolve(text)
    assert value == expected and type(value) is type(expected)


def test_nan_is_a_number() -> None:
    assert math.isnan(strict_yaml.resolve(".nan"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a, 1, 1e-4]", ["a", 1, 1e-4]), ("[384, 640]", [384, 640]), ("'1'", "1"), ('"null"', "null"), (" 0.6 ", 0.6),
        ("a: b", "a: b"), ("-x", "-x"), ("a #b", "a #b"), ("*a", "*a"), ("!!int 3", "!!int 3"), ("{a: 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_command_line_values(text: str, expected: object) -> None:
    assert strict_yaml.value(text, "here") == expected


def test_bom_crlf_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a b é.yaml"
    path.write_bytes(b"\xef\xbb\xbfprune:\r\n  keep: 0.5\r\n\r\n  list:\r\n    - a\r\nnames: {0: no, 1: yes}\r\n")
    document = strict_yaml.load(path)
    assert document.data == {"prune": {"keep": 0.5, "list": ["a"]}, "names": {0: "no", 1: "yes"}}
    assert document.lines[("prune", "keep")] == 2 and document.lines[("names", 1)] == 6
    assert document.where(("prune", "list", 0)) == f"{path}:4"
    assert document.where(("prune", "other")) == f"{path}:1" and document.where(("other",)) == str(path)


def test_blank_values_are_distinguished_from_null() -> None:
    document = strict_yaml.parse("a:\nb: null\nc: ''\nd: {e: }\n", "f")
    assert document.data == {"a": None, "b": None, "c": "", "d": {"e": None}}
    assert document.blank == {("a",), ("d", "e")}


REFUSED = {
    "duplicate key": ("a: 1\nb: 2\na: 3\n", "f.yaml:3: duplicate key a (first on line 1)"),
    "duplicate below": ("s:\n  a: 1\n  a: 1\n", "f.yaml:3: duplicate key a (first on line 2)"),
    "duplicate number": ("{1: a, 0x1: b}", "f.yaml:1: duplicate key 1"),
    "python object": ("a: 1\nb: !!python/object/apply:os.system [x]", "f.yaml:2: tag !!python/object/apply:os.system"),
    "tag": ("a: !!str 1", "f.yaml:1: tag !!str is not allowed"),
    "bare tag": ("a: !", "f.yaml:1: tag ! is not allowed"),
    "anchor": ("a: &x 1", "f.yaml:1: anchor &x is not allowed"),
    "laughs": ("a: &a [l, l]\nb: &b [*a, *a]\nc: [*b, *b]", "f.yaml:1: anchor &a is not allowed"),
    "alias": ("a: *x", "f.yaml:1: alias *x is not allowed; write the value out"),
    "tab": ("a:\n\tb: 1", "f.yaml:2: found character '\\t' that cannot start any token; indent with spaces"),
    "deep": ("a: " + "[" * 20_000, "f.yaml:1: nested deeper than 16 levels"),
    "many": ("a: [" + "1," * 20_000 + "]", "f.yaml:1: more than 20000 values"),
    "two documents": ("a: 1\n---\nb: 1", "f.yaml:2: but found another document"),
    "control character": ("a: 1\nb: \x07", "f.yaml:2: character U+0007 is not allowed"),
    "huge escape": ('a: "\\UFFFFFFFF"', "f.yaml: Python int too large"),
    "open quote": ("a: 'b", "f.yaml:1: found unexpected end of stream"),
    "version": ("%YAML 9.9\n---\na: 1", "f.yaml:1: found incompatible YAML document"),
    "list key": ("? [a]\n: 1", "f.yaml:1: a key must be text or a whole number"),
    "true key": ("true: 1", "f.yaml:1: a key must be text or a whole number"),
    "empty": ("", "f.yaml: is empty"),
    "comments only": ("# nothing\n", "f.yaml: is empty"),
    "null": ("---\n", "f.yaml: is empty"),
    "list": ("\n- a: 1\n", "f.yaml:2: top level is a list; expected a mapping"),
    "scalar": ("hello", "f.yaml:1: top level is a single value"),
}


@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        strict_yaml.parse(text, "f.yaml")
    assert message in str(caught.value) and caught.value.exit_code == 2 and "\n" not in str(caught.value)


BYTES = {
    "UTF-16": ("a: 1".encode("utf-16"), "is UTF-16 or UTF-32; save it as UTF-8"),
    "Latin-1": (b"a: 1\nb: \xe9\n", ":2: is not UTF-8 text (byte 0xe9 at 8)"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00", "is not UTF-8 text"),
    "NUL": (b"a: \x00", "U+0000 is not allowed"),
    "10 MB": (b"a: 1\n" * 2_000_000, "larger than 256 KiB"),
}


@pytest.mark.fault(4)
@pytest.mark.parametrize("case", BYTES)
def test_refused_files(case: str, tmp_path: Path) -> None:
    content, message = BYTES[case]
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        strict_yaml.load(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.fault(5)
def test_refused_paths(tmp_path: Path) -> None:
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "file").write_text("a: 1")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, message in {
        "none.yaml": "no such file", "file/x.yaml": "no such file", ".": "is a directory", "pipe.yaml": "not a regular",
        "dangling.yaml": "gone, which does not exist", "loop.yaml": "symbolic links", "x" * 300: "name too long",
        "a/" * 3000: "name too long", "a\0b": "null byte", "new\nline": "new\\nline",
    }.items():  # fmt: skip
        with pytest.raises(DataError) as caught:
            strict_yaml.load(tmp_path / name, DataError)
        text = str(caught.value)
        assert message in text and "\n" not in text and str(tmp_path) in text


@pytest.mark.fault(5)
def test_unreadable_file_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("a: 1")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", denied)  # chmod 000 does not stop root
    with pytest.raises(StorageError) as caught:
        strict_yaml.load(path)
    assert str(caught.value) == f"{path}: cannot be read: Permission denied" and caught.value.exit_code == 6


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=8), trees, min_size=1, max_size=4))
def test_dump_reads_back_equal(data: dict[str, object]) -> None:
    assert strict_yaml.parse(strict_yaml.dump(data), "f").data == data


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="ab01:-[]{},&*!|>'\"%@`#?~ \n\t\r\ufeff\u2028", max_size=40))
def test_any_text_is_read_or_is_an_error_of_one_line(text: str) -> None:
    try:
        assert isinstance(strict_yaml.parse(text, "f").data, dict)
    except RecipeError as error:
        assert str(error).startswith("f") and "\n" not in str(error)
