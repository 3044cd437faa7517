"""The strict JSON reader returns a mapping with finite numbers, or raises an error of one line."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from yolo_compress.data import digits
from yolo_compress.errors import CorruptArtifact, RecipeError, StorageError
from yolo_compress.files import strict_json
from yolo_compress.prune.latency import SCHEMA, read_table
from yolo_compress.runtime import json_text
from yolo_compress.runtime.backends import onnx_metadata
from yolo_compress.runtime.errors import EngineError
from yolo_compress.stages import load_progress

PLAIN = {
    "data/cache.py", "evaluate/exported_files.py", "lint/isolated.py", "prune/latency.py", "rollout/shadow_log.py",
    "store/fingerprint.py",
    "train/connection.py",  # what the ranks of one command put into their store
}  # fmt: skip

CASES = {
    "10 to the 400": (b'{"a": 1' + b"0" * 400 + b"}", "a whole number of 401 digits"),
    "1e400": (b'{"a": 1e400}', "1e400 is larger than any number"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a key twice": (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
    "a list": (b"[1]", "is a list, expected a mapping"),
    "no UTF-8": (b'{"a": "\xff"}', "not usable JSON"),
    "cut short": (b'{"a": [1, 2', "not usable JSON"),
    "empty": (b"", "not usable JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_unusable_json_is_an_error_of_one_line(case: str, tmp_path: Path) -> None:
    data, says = CASES[case]
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(CorruptArtifact) as caught:
        strict_json.load(tmp_path / "a.json", CorruptArtifact)
    assert says in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_valid_json_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"a": [1, -2.5e-3, null, true, "\xc3\xa9"], "b": {"a": 999999999999999999}}'
    )
    found = strict_json.load(tmp_path / "a.json", RecipeError)
    assert found == {"a": [1, -0.0025, None, True, "é"], "b": {"a": 999999999999999999}}


def test_a_file_that_is_too_large_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_BYTES", 4)
    (tmp_path / "a.json").write_bytes(b'{"a":1}')
    with pytest.raises(RecipeError, match="larger than 0 MiB"):
        strict_json.load(tmp_path / "a.json", RecipeError)
    with pytest.raises(StorageError, match="Is a directory"):
        strict_json.load(tmp_path, RecipeError)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        f'{{"schema": {SCHEMA}, "whole_ms": "fast", "layers": [1], "rest": 1}}',
        f'{{"schema": {SCHEMA}, "whole_ms": 1, "layers": [1], "rest": 1}}',
        f'{{"schema": {SCHEMA}, "whole_ms": 1e999, "layers": [1], "rest": 1}}',
    ],
)
def test_an_invalid_table_of_layer_times(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(CorruptArtifact, match=r"table\.json"):
        read_table(tmp_path / "table.json", (640, 640))


@pytest.mark.parametrize("case", [*CASES, "another form"])
def test_the_files_of_a_killed_stage_are_read_strictly(case: str, tmp_path: Path) -> None:
    data, says = CASES.get(case, (b'{"groups": [1]}', "groups is not of type dict"))
    kept = tmp_path / "sensitivity.json"
    assert load_progress(kept, {"groups": dict}) is None
    kept.write_bytes(data)
    with pytest.raises(CorruptArtifact) as caught:
        load_progress(kept, {"groups": dict})
    said = str(caught.value)
    assert says in said and "\n" not in said and said.endswith(f"; delete {kept} to measure again")
    kept.write_bytes(b'{"groups": {"a": [0.5]}}')
    assert load_progress(kept, {"groups": dict}) == {"groups": {"a": [0.5]}}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_record_of_drawn_digits_is_ignored(case: str, tmp_path: Path) -> None:
    (tmp_path / digits.RECORD).write_bytes(CASES[case][0])
    assert not digits.is_complete(tmp_path, {"a": 1})


def test_names_of_an_onnx_file_that_nest_too_deeply(tmp_path: Path) -> None:
    net = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    onnx.helper.set_model_props(net, {"names": "[" * 100_000, "imgsz": "[64, 64]"})
    onnx.save(net, str(tmp_path / "net.onnx"))
    with pytest.raises(EngineError, match="no usable class names") as caught:
        onnx_metadata.names_and_imgsz(tmp_path / "net.onnx")
    assert "\n" not in str(caught.value)


def test_no_file_is_read_by_plain_json() -> None:
    """`json.loads` is only for text that this process or its child has just written, or whose hash was checked."""
    package = Path(strict_json.__file__).parents[1]
    plain = {
        f"{file.relative_to(package)}: {line.strip()}"
        for file in package.rglob("*.py")
        for line in file.read_text(encoding="utf-8").splitlines()
        if " json.load" in line.replace("(", " ") and ".file(" not in line and "runtime" not in file.parts
    }
    assert {row.partition(":")[0] for row in plain} == PLAIN, plain
