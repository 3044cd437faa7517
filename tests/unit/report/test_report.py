"""The report: gate, missing figures as dashes, one image set, escaped names, equal bytes for equal input."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.report_case import (
    EVIL,
    HINT,
    IMAGES,
    ab,
    built,
    document,
    item,
    missing,
    row,
    rows,
    stage,
    untimed,
    whole,
)
from yolo_compress.errors import DataError, RecipeError
from yolo_compress.report import numbers
from yolo_compress.report.as_text import render_markdown, render_text
from yolo_compress.report.charts import gallery
from yolo_compress.report.gate import judge
from yolo_compress.report.html import render, tiles
from yolo_compress.report.tables.bench import bench_table, files_table
from yolo_compress.report.write import write


class Page(HTMLParser):
    """Collect the tags of a page, and all addresses that its attributes could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or ""
            for key, value in attrs
            if key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


# gate


@pytest.mark.fault(42)
@pytest.mark.parametrize("reference", [0.6, 0.621, 0.1, 1 / 3])
@pytest.mark.parametrize("bound", [0.95, 0.98, 0.99])
def test_exactly_the_bound_passes_and_a_billionth_below_fails(reference: float, bound: float) -> None:
    assert document(rows(reference * bound, reference), bound)["gate"]["passed"]
    failed = document(rows(reference * bound - 1e-9, reference), bound)
    assert not failed["gate"]["passed"] and failed["verdict"]["status"] == "fail"
    kept, low = re.findall(r"([\d.]+) %", failed["verdict"]["line"])[:2]
    assert float(kept) < float(low), "the line shows two equal figures"


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("value", "reference", "reason"),
    [
        (float("nan"), 0.6, r"INT8 on OpenVINO is not a number \(nan\)"),
        (float("inf"), 0.6, r"not a number \(inf\)"),
        (0.5, float("nan"), "the baseline's mAP50-95 is not a number"),
        (0.5, 0.0, "the baseline's mAP50-95 is 0"),
        (0.0, 0.0, "the baseline's mAP50-95 is 0"),
    ],
)
def test_what_cannot_be_divided_fails_with_its_reason(value: float, reference: float, reason: str) -> None:
    report = document(rows(value, reference))
    assert not report["gate"]["passed"] and report["gate"]["retention"] is None
    assert re.search(reason, report["verdict"]["line"]) and report["verdict"]["line"].startswith("FAIL: ")
    json.dumps(report, allow_nan=False)


def test_the_worst_int8_row_decides() -> None:
    bench = [*rows(0.6), row("original", "onnxruntime", "fp32", 0.6), row("compressed", "onnxruntime", "int8", 0.5)]
    report = document(bench, 0.95)
    assert not report["gate"]["passed"] and report["gate"]["worst"] == "compressed-onnxruntime-int8"
    assert [entry["passed"] for entry in report["gate"]["judged"]] == [False, True]
    assert report["gate"]["retention"] == pytest.approx(0.5 / 0.6)


def test_a_row_that_is_not_a_number_decides_over_every_other() -> None:
    bench = [*rows(float("nan")), row("compressed", "onnxruntime", "int8", 0.1)]
    assert document(bench)["gate"]["worst"] == "compressed-openvino-int8"


def test_float_rows_are_judged_only_where_no_int8_was_asked_for() -> None:
    float_only = [entry for entry in rows() if entry["precision"] == "fp32"]
    assert document(float_only)["gate"]["worst"] == "compressed-openvino-fp32"
    unmeasured = document([*float_only, missing("compressed", "int8")])
    assert not unmeasured["gate"]["passed"]
    assert unmeasured["verdict"]["line"] == "FAIL: no INT8 row of the compressed model was measured"


def test_without_the_baseline_nothing_can_pass() -> None:
    report = document([row("compressed", "openvino", "int8", 0.6)])
    assert not report["gate"]["passed"] and "no FP32 row of the baseline" in report["verdict"]["line"]
    assert not document([])["gate"]["passed"]


def test_the_reference_is_torch_and_the_speed_up_is_relative_to_the_same_runtime() -> None:
    bench = rows()
    bench[0].update(latency_p50_ms=100.0, map50_95=0.61)
    report = document(bench)
    by_id = {entry["id"]: entry for entry in report["rows"]}
    int8 = by_id["compressed-openvino-int8"]
    assert report["gate"]["reference"] == "original-torch-fp32" and int8["retention"] == pytest.approx(0.59 / 0.61)
    assert int8["speed_up"] == 2.5 and int8["size_ratio"] == 4.0


def test_the_verdict_line() -> None:
    assert document()["verdict"]["line"] == (
        "PASS: INT8 on OpenVINO has 98.3 % of the baseline's mAP50-95 (0.600 -> 0.590), 2.5x faster, 4.0x smaller"
    )
    slow = rows()
    slow[3].update(latency_p50_ms=40.0)
    report = document(slow, 0.99)
    assert report["verdict"]["line"].endswith("below the gate of 99.0 %; 2.0x slower, 4.0x smaller")
    assert [tile.gain for tile in tiles(report)] == [
        "98.3 %",
        "2.0x slower",
        "4.0x smaller",
        "100 %",
        "100 %",
    ]


@pytest.mark.parametrize("bound", [float("nan"), -0.1, 1.1])
def test_an_invalid_bound_is_refused(bound: float) -> None:
    with pytest.raises(RecipeError, match=r"report\.min_retention"):
        judge([], bound)


# rows


@pytest.mark.fault(65)
def test_two_image_sets_are_refused() -> None:
    bench = rows()
    bench[3]["image_set"] = "b2" * 32
    both = f"baseline FP32 on PyTorch.*{IMAGES}.*compressed INT8 on OpenVINO.*{'b2' * 32}"
    with pytest.raises(RecipeError, match=both):
        document(bench)
    with pytest.raises(RecipeError, match="stage prune"):
        document(chain=[stage("prune", 0.5, image_set="c3" * 32)])
    bench[3]["image_set"] = None
    with pytest.raises(RecipeError, match="compressed-openvino-int8 has no image_set"):
        document(bench)


def test_malformed_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match="given twice"):
        document([*rows(), rows()[0]])
    with pytest.raises(RecipeError, match="precision 'int4'"):
        document([row("original", "torch", "int4", 0.5)])
    with pytest.raises(RecipeError, match="epoch 0 has 1 counts, expected 2"):
        document(gammas={"edges": [0, 1, 2], "epochs": [[1]]})


@pytest.mark.fault(62)
def test_missing_rows_are_dashes_with_the_hint() -> None:
    report = document()
    assert report["missing"] == [
        {
            "runtime": "tensorrt",
            "models": ["original", "compressed"],
            "precisions": ["int8"],
            "reason": HINT,
            "device": None,
        }
    ]
    cells = bench_table(report).lines[-1].cells
    assert cells[:3] == ("TensorRT", "both", "INT8") and cells[-1] == "missing" and set(cells[3:-1]) == {numbers.DASH}
    for text in (render_text(report), render_markdown(report)):
        assert HINT in text


@pytest.mark.fault(68)
@pytest.mark.parametrize(("n", "shown"), [(661, numbers.DASH), (662, "11.0")])
def test_p99_is_withheld_below_662_runs(n: int, shown: str) -> None:
    bench = rows()
    bench[3]["latency_n"] = n
    report = document(bench)
    table = bench_table(report)
    column = [entry.title for entry in table.columns].index("p99 ms")
    line = next(line for line in table.lines if line.cells[1:3] == ("compressed", "INT8"))
    assert line.cells[column] == shown
    assert any("p99 withheld: n = 661" in note and "compressed INT8 on OpenVINO" in note for note in table.notes) == (
        n == 661
    )


@pytest.mark.parametrize(("float_ms", "said"), [(7.5, False), (6.0, True)])
def test_int8_that_gains_nothing_is_said(float_ms: float, said: bool) -> None:
    bench = rows()
    int8 = next(row for row in bench if (row["model"], row["precision"]) == ("compressed", "int8"))
    int8["latency_p50_ms"] = 7.0  # FP32 takes 8
    bench.append({**int8, "precision": "fp16", "latency_p50_ms": float_ms})
    notes = [note for note in bench_table(document(bench)).notes if "INT8 gains nothing" in note]
    text = (
        "INT8 gains nothing here: FP16 on the same runtime takes 6.00 ms, INT8 7.00 ms (compressed INT8 on OpenVINO)."
    )
    assert notes == ([text] if said else [])


def test_schema_and_plain_types() -> None:
    bench = rows()
    bench[0]["map50_95"] = np.float64(0.6)
    report = document(bench, environment={"versions": {"torch": "2"}, "device": "cpu", "path": Path("x")})
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert list(report) == [
        "schema",
        "recipe",
        "verdict",
        "gate",
        "rows",
        "missing",
        "control",
        "data",
        "chain",
        "not_tested",
        "not_recorded",
        "gammas",
        "channels",
        "flops",
        "sensitivity",
        "recovery",
        "ab",
        "errors",
        "latency_quantiles",
        "quantisation",
        "placement",
        "devices",
        "references",
        "reproduce",
        "environment",
    ]
    assert report["schema"] == 3 and report["data"]["image_set"] == IMAGES
    assert report["not_recorded"] == ["commit", "imgsz_px", "batch", "warm_up"]
    assert [entry["delta_map50_95"] for entry in report["chain"]] == [None, pytest.approx(-0.05)]


@pytest.mark.fault(62)
def test_numbers_never_invent_a_zero() -> None:
    for write_number in (
        numbers.fixed,
        numbers.signed,
        numbers.three_digits,
        numbers.percent,
        numbers.times,
        numbers.millions,
        numbers.integer,
        numbers.duration,
    ):
        assert write_number(None) == write_number(float("nan")) == numbers.DASH
    assert [numbers.three_digits(value) for value in (0, 0.01234, 4.306, 17.9, 1234.5)] == [
        "0",
        "0.0123",
        "4.31",
        "17.9",
        "1,234",
    ]
    assert [numbers.duration(value) for value in (2.13, 59.7, 75, 3725)] == [
        "2.1 s",
        "60 s",
        "1 min 15 s",
        "1 h 02 min",
    ]


# forms


def test_text_fits_the_terminal_and_says_what_it_left_out() -> None:
    narrow = render_text(document(), 80)
    tables = narrow[narrow.index("Chain\n") : narrow.index("Missing\n")]
    assert max(map(len, tables.splitlines())) <= 80
    notes = re.findall(r"\(not shown at this width: ([^)]*)\)", tables)
    assert len(notes) == 2 and all("p99 ms" in note for note in notes)
    assert "not shown" not in render_text(document(), 200)


def test_a_stage_that_saw_no_labels_says_so_under_the_chain() -> None:
    said = "64 images inverted from the teacher, no label: mAP50-95 0.500 before, 0.480 after"
    chain = [stage("baseline", 0.6), stage("prune", 0.5), stage("distill", 0.48, trained_on=said)]
    assert f"distill trained on {said}." in render_markdown(document(chain=chain))
    assert " trained on " not in render_markdown(document())


def test_rows_of_torch_on_a_gpu_name_it() -> None:
    bench = [one | {"gpu": "NVIDIA L4"} if one["runtime"] == "torch" else one for one in rows()]
    text = render_markdown(document(bench))
    assert "| PyTorch (NVIDIA L4) | baseline | FP32 | 0.600 |" in text
    assert "NVIDIA" not in render_markdown(document())


def test_markdown_tables() -> None:
    text = render_markdown(document(recipe="a|b <i>", reproduce={"recipe_yaml": "x: '```'\n", "command": "make all"}))
    assert text.startswith("# a\\|b &lt;i&gt;\n\n**PASS: INT8 on OpenVINO has 98.3 %")
    assert "| prune | 0.550 | -0.050 | – | – | 3.00 M | 2.00 | 6.00 | – | – | – | 0.900 | 5 | 1 min 15 s |" in text
    assert (
        "| OpenVINO INT8 | 0.590 | -0.010 | – | – | 3.00 M | 2.00 | 3.00 | 8.00 | 9.00 | 11.0 | 0.900 | – | – |" in text
    )
    assert "| OpenVINO | compressed | INT8 | 0.590 | 98.3 % |" in text
    assert "````yaml\nx: '```'\n````" in text and f"image set: {IMAGES}" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {15}


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    bench = [*rows(), row("compressed", EVIL, "int8", 0.6, executed=EVIL)]
    report = whole(
        rows=bench,
        recipe=EVIL,
        data={"yaml": EVIL, "skipped": [f"{EVIL}:1: bad"], "notes": [EVIL]},
        channels={EVIL: [8, 4]},
        environment={"device": EVIL},
        reproduce={"recipe_yaml": EVIL},
        not_tested=[EVIL],
        chain=[stage("baseline", 0.6), stage(EVIL, 0.6)],
        ab=ab((EVIL, f"{EVIL}2"), a={"label": EVIL}),
        placement=[{"tensor": EVIL, "precision": "float", "group": EVIL, "why": EVIL}],
        latency_quantiles={f"compressed-{EVIL}-int8": [1.0] * 101},
    )
    paths = write(
        report, [item(f"{EVIL}.jpg", (f"\"'><img src=x onerror=alert(1)>{EVIL}",))], tmp_path_factory.mktemp("report")
    )
    return paths["html"].read_text("utf-8")


def test_a_name_is_no_markdown_either() -> None:
    text = render_markdown(document(recipe="![x](http://evil.example/x.png) [a](b) *c* _d_ `e` imgsz_px"))
    assert text.startswith(r"# !\[x\](http://evil.example/x.png) \[a\](b) \*c\* \_d\_ \`e\` imgsz_px")


@pytest.mark.fault(69)
def test_names_are_shown_as_text(evil_page: str) -> None:
    page = Page(evil_page)
    assert "script" not in page.tags
    assert page.tags.count("img") == 2, "only the two images of the gallery"
    assert page.text.count(EVIL) >= 20


def test_nothing_is_loaded(evil_page: str) -> None:
    page = Page(evil_page)
    assert page.addresses and all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not {"link", "script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "@import" not in evil_page and not re.search(r"https?://|url\((?!#)", evil_page)
    assert "default-src 'none'; img-src data:" in evil_page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(document(), [item()], tmp_path_factory.mktemp("report"))


def test_same_input_same_bytes(tmp_path: Path, written: dict[str, Path]) -> None:
    both = [written, write(document(), [item()], tmp_path)]
    assert set(both[0]) == {"html", "md", "json"}
    for kind in both[0]:
        assert both[0][kind].read_bytes() == both[1][kind].read_bytes()
    assert json.loads(both[0]["json"].read_text("utf-8")) == document()


def test_a_report_with_almost_no_data_is_written(tmp_path: Path) -> None:
    bench = [row("original", "torch", "fp32", 0.6), row("compressed", "torch", "int8", float("nan"))]
    for entry in bench:
        entry["latency_p50_ms"] = None
    page = Page(write(built(bench), [], tmp_path)["html"].read_text("utf-8"))
    assert "svg" not in page.tags and "img" not in page.tags and "is not a number (nan)" in page.text
    write(built([]), [], tmp_path)


def test_charts_use_the_order_of_the_model_and_the_theme(written: dict[str, Path]) -> None:
    text = written["html"].read_text("utf-8")
    assert text.index(">model.2.cv1<") < text.index(">model.10.conv<")
    assert "var(--after)" in text and "#5a5b5c" not in text and "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 6, "three charts, wide and narrow"


# gallery


def test_gallery_counts_found_missed_and_extra() -> None:
    pair = gallery.draw([item()]).pairs[0]
    assert (pair.baseline.found, pair.baseline.missed, pair.baseline.extra) == (1, 1, 0), "0.1 is below the score shown"
    assert (pair.compressed.found, pair.compressed.missed, pair.compressed.extra) == (1, 1, 1)
    assert (pair.compressed.lost, pair.compressed.new) == (0, 1)


def test_gallery_says_what_was_lost_and_what_is_new() -> None:
    truths = [(0, 0.5, 0.5, 0.25, 0.5), (0, 0.1, 0.1, 0.1, 0.1)]
    a = np.array([[48, 24, 80, 72, 0.9, 0], [100, 60, 120, 90, 0.5, 0]], float)
    b = np.array(
        [[101, 60, 120, 90, 0.5, 0], [0, 80, 20, 95, 0.4, 0]], float
    )  # the first false one is the original's too
    pair = gallery.draw([item(truths=truths, detections_a=a, detections_b=b)]).pairs[0]
    assert (pair.baseline.found, pair.baseline.extra, pair.baseline.lost, pair.baseline.new) == (1, 1, 0, 0)
    assert (pair.compressed.missed, pair.compressed.lost, pair.compressed.extra, pair.compressed.new) == (2, 1, 2, 1)


def test_a_truth_is_found_once_and_only_by_its_class() -> None:
    truths = np.array([[0, 0, 0, 10, 10], [1, 20, 0, 30, 10]], float)
    detections = np.array([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 10, 0.8, 0], [20, 0, 30, 10, 0.7, 0]], float)
    found, used = gallery.match(truths, detections)
    assert found.tolist() == [True, False] and used.tolist() == [True, False, False]


def test_gallery_reads_files_and_stays_in_its_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    entry = item("noise.png", image=tmp_path / "noise.png")
    drawn = gallery.draw([entry] * 13)
    assert len(drawn.pairs) == gallery.COUNT and (drawn.pairs[0].width, drawn.pairs[0].height) == (400, 300)
    assert (
        sum(len(side.uri) for pair in drawn.pairs for side in (pair.baseline, pair.compressed)) <= gallery.BUDGET_BYTES
    )


def test_an_image_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    for name in ("bad.jpg", "absent.jpg"):
        with pytest.raises(DataError, match=name):
            gallery.draw([item(name, image=tmp_path / name)])


@pytest.mark.parametrize("size", [(3000, 12), (5, 3000)])
def test_an_image_of_any_shape_is_drawn(size: tuple[int, int]) -> None:
    boxes = np.array([[1, 1, 9, 4, 0.9, 0], [0, 0, 2, 2, 0.5, 0]], float)
    image, truths = np.zeros((*size, 3), np.uint8), [(0, 0.5, 0.5, 1, 1)]
    long = item(
        "long", ("a name of some length",), image=image, truths=truths, detections_a=boxes, detections_b=boxes[:1]
    )
    (pair,) = gallery.draw([long]).pairs
    data = base64.b64decode(pair.baseline.uri.partition(",")[2])
    width, height = Image.open(io.BytesIO(data)).size
    assert width <= 480 and 1 <= height <= 4 * 480


def test_files_without_an_engine_have_a_table_of_their_own() -> None:
    report = document([*rows(), untimed(0.57)], 0.98)
    table = files_table(report)
    assert [line.cells[:4] for line in table.lines] == [
        ("compressed/int8-tensorrt11.onnx", "TensorRT 11", "0.570", "95.0 %")
    ]
    assert table.lines[0].mark == "failed" and not files_table(document()).lines
    assert "TensorRT 11" not in [line.cells[0] for line in bench_table(report).lines]
    assert report["verdict"]["line"] == (
        "FAIL: INT8 for TensorRT 11 has 95.0 % of the baseline's mAP50-95 (0.600 -> 0.570), below the gate of 98.0 %; "
        "INT8 on OpenVINO is 2.5x faster, 4.0x smaller"
    )
    assert [tile.title for tile in tiles(report)][:3] == ["mAP50-95", "Latency p50, ms", "Size, MiB"]
    page, text = render(report, gallery.draw([], 0)), render_text(report, 160)
    assert '<h2 id="files">Files</h2>' in page and "compressed/int8-tensorrt11.onnx" in page
    assert "compressed/int8-tensorrt11.onnx" in text and "compressed/int8-tensorrt11.onnx" in render_markdown(report)
