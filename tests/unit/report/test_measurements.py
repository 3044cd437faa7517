"""The data of the report: A/B, error types, raw latencies, intervals, INT8 sensitivity, and the choice of images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.matching_scenes import scene
from tests.support.report_case import (
    EVIL,
    IMAGES,
    PLACEMENT,
    QUANTISATION,
    ab,
    document,
    errors,
    item,
    row,
    rows,
    stage,
    whole,
)
from yolo_compress.errors import RecipeError
from yolo_compress.evaluate.stored_detections import keep
from yolo_compress.report import measurements, numbers, stage_files
from yolo_compress.report.as_text import render_markdown, render_text
from yolo_compress.report.bench_rows import with_ids
from yolo_compress.report.charts import gallery
from yolo_compress.report.charts.curves import every_per_cent
from yolo_compress.report.charts.forest import MAX_CLASSES, differences, left_out
from yolo_compress.report.charts.quantised import gains_of_groups, quantisation_table, summary
from yolo_compress.report.image_choice import choose
from yolo_compress.report.intervals import intervals
from yolo_compress.report.tables.ab import errors_table, figures_table, parts_table
from yolo_compress.report.tables.chain import chain_table
from yolo_compress.report.write import write
from yolo_compress.runtime.measure.coco_map import mean_ap as matched


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(whole(), [item()], tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def page(written: dict[str, Path]) -> str:
    return written["html"].read_text("utf-8")


def cells(table: Any, first: str) -> tuple[str, ...]:
    return next(line.cells for line in table.lines if line.cells[0] == first)


def test_limits_and_tiers_of_the_worst_row_are_shown(page: str) -> None:
    assert (
        "<li>MLPerf&#39;s targets, in per cent of the mAP in FP32: 95 % reached, 99 % not reached, 99.9 % not reached</li>"
        in page
    )
    report = document(max_latency_ms=5.0, max_size_mib=4.0)
    assert report["gate"]["max_latency_ms"] == 5.0 and not report["gate"]["passed"]
    text = render_markdown(report)
    assert "- failed: p50 of INT8 on OpenVINO is 8 ms, above report.max_latency_ms=5" in text
    assert "- passed: size 3.00, limit 4.00" in text
    assert "- passed: classes, input and output are those of the baseline" in text
    other = rows()
    other[3]["signature"] = {**other[3]["signature"], "output": [84, 2100]}
    assert "- failed: INT8 on OpenVINO does not fit where the baseline does: output" in render_markdown(document(other))


# A/B


def test_the_ab_verdict_stands_under_the_first_and_every_form_has_it(page: str) -> None:
    line = "these images cannot show whether mAP50-95 of B is more than 1 % below that of A: 0.600 -> 0.590"
    assert f"A/B: INCONCLUSIVE: {line}" in render_text(whole()).splitlines()[1]
    assert f"**INCONCLUSIVE: {line.replace('>', '&gt;')}**" in render_markdown(whole())
    assert (
        page.index("PASS</span>")
        < page.index('<span class="badge inconclusive">A/B inconclusive</span>')
        < page.index('id="gate"')
    )
    assert "A: baseline, FP32 on PyTorch; B: compressed, INT8 on OpenVINO." in page


def test_ab_figures() -> None:
    table = figures_table(ab())
    assert cells(table, "mAP50-95")[1:] == ("0.600", "0.590", "-0.010", "-0.020 to +0.000")
    assert cells(table, "Recall at score 0.3")[1:] == ("90.0 %", "87.5 %", "-2.5 %", numbers.DASH)
    assert cells(table, "Missed at score 0.3")[1:] == ("12", "15", "+3", numbers.DASH)
    assert cells(table, "Latency p50, ms (difference: ratio)")[1:] == ("20.0", "8.00", "2.5x", "2.4x to 2.6x")
    assert any("At score 0.25 the compressed model has the baseline's recall." in note for note in table.notes)
    none = ab(latency=None, operating={**ab()["operating"], "threshold_b": None})
    assert len(figures_table(none).lines) == 6 and not any("At score" in note for note in figures_table(none).notes)
    assert figures_table(None).lines == ()


def test_parts_without_objects_are_left_out() -> None:
    table = parts_table("By class", ab()["by_class"])
    assert [line.cells[0] for line in table.lines] == ["cell", EVIL]
    assert cells(table, EVIL)[1:] == ("30", "0.500", "0.460", "-0.040", "-0.050 to -0.030")


def test_the_forest_shows_every_part_and_marks_certain_losses() -> None:
    wide = differences(ab())["wide"]
    assert "small (100)" in wide and "large" not in wide and "none of it" not in wide
    assert "-0.040  [-0.050, -0.030]" in wide
    lost = ab(by_class=[{**part, "high": 0.1} for part in ab()["by_class"] if part["truths"]])
    assert wide.count("var(--bad)") > differences(lost)["wide"].count("var(--bad)")


def test_of_many_classes_the_extremes_are_drawn() -> None:
    one = ab()["by_class"][0]
    many = ab(by_class=[{**one, "name": f"class{i}", "delta": (i - 40) / 1000} for i in range(80)])
    assert left_out(many) == 80 - MAX_CLASSES
    wide = differences(many)["wide"]
    assert ">class0 (90)<" in wide and ">class79 (90)<" in wide and ">class40 (90)<" not in wide


def test_ab_over_other_images_or_of_another_schema_is_refused() -> None:
    with pytest.raises(RecipeError, match=f"image set other, the rows over {IMAGES}"):
        document(ab=ab(image_set="other"))
    with pytest.raises(RecipeError, match="schema 2, expected 1"):
        document(ab=ab(schema=2))


# error types and latencies


def test_error_types_have_cost_and_what_one_sees() -> None:
    table = errors_table(errors())
    assert cells(table, "background")[3:] == ("0", "3") and cells(table, "missed")[3:] == ("3", "3")
    # The second detection of A has the wrong class. Corrected, it finds its object and AP50 rises from 51/101 to 1.
    assert cells(table, "classification")[1] == numbers.percent(1 - 51 / 101)
    assert table.notes == ("Costs are over all detections; counts are of those with a score above 0.25.",)
    assert errors_table(None).lines == ()


def test_quantiles_of_raw_calls() -> None:
    found = every_per_cent([float(value) for value in range(101)][::-1])
    assert found == pytest.approx(range(101))
    tied = every_per_cent([0.1 + 0.2, 0.3, 0.3, 0.3] * 7)
    assert tied == sorted(tied)
    with pytest.raises(RecipeError, match="original-torch-int8, which is no bench row"):
        document(latency_quantiles={"original-torch-int8": found})
    with pytest.raises(RecipeError, match="100 values, expected 101 that do not fall"):
        document(latency_quantiles={"original-torch-fp32": found[1:]})


# intervals


def test_intervals_are_of_the_same_images_and_hold_the_figure() -> None:
    truths, found = scene(1, images=40)
    worse = [boxes_N6 if i % 3 else boxes_N6[:0] for i, boxes_N6 in enumerate(found)]
    classes = 1 + int(max(rows_N5[:, 0].max(initial=0) for rows_N5 in truths))
    both = intervals(truths, {"a": found, "b": worse, "again": found}, "a", classes, 50, seed=0)
    assert "delta_low" not in both["a"]
    assert both["again"]["delta_low"] == both["again"]["delta_high"] == 0.0, "the same detections on the same draws"
    assert both["b"]["delta_high"] < 0 and both["b"]["map50_95_low"] < both["a"]["map50_95_high"]
    assert both == intervals(truths, {"a": found, "b": worse, "again": found}, "a", classes, 50, seed=0)


class Sample:
    """The attributes of `data.samples.Sample` that are read."""

    width = height = 400

    def __init__(self, truth_N5: np.ndarray) -> None:
        centre, size = (truth_N5[:, 1:3] + truth_N5[:, 3:]) / 800, (truth_N5[:, 3:] - truth_N5[:, 1:3]) / 400
        self.boxes = tuple((int(cls), *box) for cls, *box in np.column_stack([truth_N5[:, 0], centre, size]).tolist())


def fake_job(folder: Path, found: list[np.ndarray], truths: list[np.ndarray], **report: Any) -> Any:
    """Return a job with the same stored detections for both bench rows and for all stages except `prune`."""
    (folder / "detections").mkdir()
    for name in ("original-torch-fp32", "compressed-openvino-int8"):
        keep(folder / f"detections/{name}.npy", found)
    keep(folder / "detections.npy", found)
    bench = SimpleNamespace(file=lambda name: folder / name)
    stages = {
        name: SimpleNamespace(file=bench.file, manifest=SimpleNamespace(files=files))
        for name, files in (("baseline", {"detections.npy"}), ("qat", {"detections.npy"}), ("prune", set()))
    }
    config = SimpleNamespace(**{"ab_replicates": 30, "min_retention": 0.9, "conf": 0.5, **report})
    return SimpleNamespace(
        inputs={"bench": bench, **stages},
        dataset=SimpleNamespace(names=("bolt", "nut", "screw"), val=[Sample(truth) for truth in truths]),
        recipe=SimpleNamespace(report=config, run=SimpleNamespace(seed=0), data=SimpleNamespace(max_det=300)),
    )


def test_rows_and_stages_get_the_intervals_of_what_was_kept(tmp_path: Path) -> None:
    truths, found = scene(2, images=30)
    job = fake_job(tmp_path, found, truths)
    bench = with_ids([row("original", "torch", "fp32", 0.5), row("compressed", "openvino", "int8", 0.5), rows()[-1]])
    chain = [stage(name, 0.5) for name in ("baseline", "prune", "qat")]
    lines, stages = measurements.with_intervals(job, bench, chain)
    value = matched(truths, found, job.dataset.names)["map50_95"]
    assert lines[0]["map50_95_low"] < value < lines[0]["map50_95_high"]
    assert lines[1]["delta_low"] == lines[1]["delta_high"] == 0.0 and "map50_95_low" not in lines[2]
    assert stages[0]["map50_95_low"] == lines[0]["map50_95_low"] and "delta_low" not in stages[0], (
        "no delta of the baseline"
    )
    assert "map50_95_low" not in stages[1] and stages[2]["delta_low"] == 0.0
    none = measurements.with_intervals(
        SimpleNamespace(**{**vars(job), "recipe": without_replicates(job)}), bench, chain
    )
    assert none == (bench, chain)


def test_where_ab_has_an_interval_the_row_shows_it() -> None:
    document_of_ab = ab(a={"label": "A", "row": "x"}, b={"label": "B", "row": "y"})
    document_of_ab["map50_95"] |= {"interval_a": [0.5, 0.7], "interval_b": [0.4, 0.6]}
    lines = measurements.with_ab_intervals([{"id": "x"}, {"id": "y", "delta_low": 9.0}, {"id": "z"}], document_of_ab)
    assert lines[0] == {"id": "x", "map50_95_low": 0.5, "map50_95_high": 0.7} and lines[2] == {"id": "z"}
    assert (lines[1]["delta_low"], lines[1]["delta_high"]) == (pytest.approx(-0.02), pytest.approx(0.0))
    assert lines[1]["map50_95_low"] == 0.4 and measurements.with_ab_intervals(lines, None) == lines


def without_replicates(job: Any) -> Any:
    return SimpleNamespace(
        report=SimpleNamespace(**{**vars(job.recipe.report), "ab_replicates": 0}),
        run=job.recipe.run,
        data=job.recipe.data,
    )


def test_error_types_and_images_are_of_the_worst_row(tmp_path: Path) -> None:
    truths, found = scene(3, images=10)
    job = fake_job(tmp_path, found, truths)
    engines = [
        row("compressed", runtime, "int8", value) for runtime, value in (("openvino", 0.5), ("onnxruntime", 0.55))
    ]
    robot = row("compressed", "tensorrt", "int8", 0.1, device="a robot")
    bench = with_ids([row("original", "torch", "fp32", 0.6), *engines, robot])
    both = measurements.compared_rows(bench, 0.9)
    assert both is not None and [line["id"] for line in both] == ["original-torch-fp32", "compressed-openvino-int8"]
    types = measurements.error_types(job, bench)
    assert types is not None and types["a"] == types["b"] and types["conf"] == 0.5
    assert types["shown_a"]["detections"] == sum(int((boxes_N6[:, 4] > 0.5).sum()) for boxes_N6 in found)
    assert measurements.compared_rows(bench[1:], 0.9) is None and measurements.error_types(job, bench[:1]) is None


def test_the_chain_goes_down_to_the_engines_with_intervals_and_torch_latency() -> None:
    bench = rows()
    bench[0] |= {"map50_95_low": 0.57, "map50_95_high": 0.63}
    bench[3] |= {"map50_95_low": 0.56, "map50_95_high": 0.62, "delta_low": -0.02, "delta_high": 0.001}
    report = document(
        [*bench, row("compressed", "torch", "fp32", 0.6)], chain=[stage("baseline", 0.6), stage("prune", 0.55)]
    )
    table = chain_table(report)
    assert [line.cells[0] for line in table.lines] == ["baseline", "prune", "OpenVINO FP32", "OpenVINO INT8"]
    title = [column.title for column in table.columns]
    baseline, pruned, engine = (
        dict(zip(title, cells(table, name), strict=True)) for name in ("baseline", "prune", "OpenVINO INT8")
    )
    assert (
        baseline["95 % interval"] == "0.570 to 0.630"
        and baseline["p50 ms"] == "20.0"
        and baseline["Delta"] == numbers.DASH
    )
    assert pruned["95 % interval"] == numbers.DASH and pruned["p50 ms"] == "8.00"
    assert engine["Delta interval"] == "-0.020 to +0.001" and engine["Delta"] == "-0.010" and engine["p99 ms"] == "11.0"


# INT8


def test_the_gain_of_a_group_is_positive_for_a_higher_map_and_for_a_lower_loss() -> None:
    report = document(quantisation=QUANTISATION)["quantisation"]
    assert report["gives_back"] == {
        "images": pytest.approx(-0.01),
        "model.4.cv2": pytest.approx(0.16),
        "model.10.cv1": 0.0,
    }
    by_map = {**QUANTISATION, "measure": "map50_95", "groups": {"images": 2.3}}
    assert document(quantisation=by_map)["quantisation"]["gives_back"]["images"] == pytest.approx(0.1)
    for absent in (("worst", "then"), ("price_ms",), ("price",)):
        with pytest.raises(RecipeError, match=f"lacks {', '.join(absent)}"):
            document(quantisation={key: QUANTISATION[key] for key in QUANTISATION if key not in absent})


@pytest.mark.parametrize(
    ("price", "unit", "cost", "words"),
    [
        (
            "openvino",
            "ms",
            "0.125",
            "the ms that its convolutions take longer than in INT8 on OpenVINO; the groups in float cost 0.125 in all.",
        ),
        ("gflops", "GFLOPs", "0.250", "the GFLOPs of its convolutions; the groups in float cost 0.250 in all."),
    ],
)
def test_the_price_of_a_group_is_shown_with_its_gain(price: str, unit: str, cost: str, words: str) -> None:
    found = stage_files.quantisation({**QUANTISATION, "price": price})
    table = quantisation_table(found)
    assert table.columns[2].title == f"Price, {unit}" and table.lines[0].cells == (
        "model.4.cv2",
        "+0.1600",
        cost,
        "float",
    )
    assert table.notes[0].endswith(f"The price of a group is {words}")
    for svg in gains_of_groups(found).values():
        assert svg.count(f">{unit}</text>") == 1 and svg.count(f">{cost}</text>") == 1


def test_placement_is_summed_up_and_whole_in_the_page(page: str) -> None:
    assert summary(PLACEMENT) == [
        "1 tensors in INT8 with 1 scales",
        "1 in float, left in float as asked: model.4.cv2",
        "2 in float, each read by one convolution in float: model.22.cv2.0.1, model.22.cv3.0.1",
    ]
    assert summary([]) == [] and "read by model.22.cv3.0.2 alone" in page


# images


def test_the_gallery_shows_worst_losses_inventions_and_chance_once_each() -> None:
    chosen = choose(ab()["flips"], 20, 2, seed=0)
    assert chosen[:4] == [("lost", 5), ("lost", 3), ("invented", 2), *chosen[3:4]]
    assert [section for section, _ in chosen] == ["lost", "lost", "invented", "random", "random"]
    images = [image for _, image in chosen]
    assert len(set(images)) == 5 and images[3:] == sorted(images[3:]) and 2 not in images[3:]
    assert choose(ab()["flips"], 20, 2, seed=0) == chosen and choose(ab()["flips"], 20, 2, seed=1) != chosen
    assert [image for _, image in choose((), 3, 12, seed=0)] == [0, 1, 2]


def test_sections_of_the_gallery_in_the_order_of_the_page() -> None:
    drawn = gallery.draw([item("b", section="random"), item("a", section="lost", min_score=0.85)])
    assert [(title, [pair.name for pair in pairs]) for title, _, pairs in drawn.sections()] == [
        ("Worst losses", ["a"]),
        ("Random images", ["b"]),
    ]
    lost = drawn.sections()[0][2][0]
    assert (lost.baseline.found, lost.compressed.found, lost.compressed.extra) == (1, 0, 0), "0.8 and 0.5 are not shown"


# forms


def test_every_section_is_there_with_a_link_to_it(page: str) -> None:
    ids = re.findall(r'<h2 id="(\w+)"', page)
    assert ids == [
        "gate", "chain", "bench", "latency", "ab", "errors", "times", "images", "pruning", "flops", "channels", "gammas",
        "quantisation", "placement", "untested", "reproduce",
    ]  # fmt: skip
    assert re.findall(r'<a href="#(\w+)"', page) == ids
    assert page.count("<svg viewBox") - page.count('aria-hidden="true"') == page.count('role="img" aria-label="')


def test_markdown_and_json_hold_what_the_page_holds(written: dict[str, Path]) -> None:
    text = written["md"].read_text("utf-8")
    for title in (
        "Chain",
        "Bench",
        "A/B",
        "By size",
        "By class",
        "Error types",
        "INT8 sensitivity",
        "Precision",
        "Not tested",
    ):
        assert f"\n## {title}\n" in text, title
    assert "<script>" not in text
    stored = json.loads(written["json"].read_text("utf-8"))
    assert stored == whole() and stored["schema"] == 3 and stored["ab"]["flips"][0]["lost"] == 2
