"""Pruning in the report: mAP after each step, FLOPs by block, and sensitivity by group."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.report_case import built
from yolo_compress.errors import RecipeError
from yolo_compress.report.as_text import pruning_table, render_markdown
from yolo_compress.report.charts.by_layer import in_order
from yolo_compress.report.numbers import DASH
from yolo_compress.report.write import write
from yolo_compress.stages import report as stage
from yolo_compress.store.manifest import Artifact, Manifest

# Two blocks and a head of two branches, not in the order of the model.
FLOPS = {
    "model.22.cv3.0.2": [1_000_000, 1_000_000],
    "model.22.cv2.0.0.conv": [8_000_000, 2_000_000],
    "model.10.conv": [40_000_000, 10_000_000],
    "model.2.m.0.cv1.conv": [3_000_000, 1_000_000],
    "model.2.cv1.conv": [1_000_000, 1_000_000],
}
LOSS = {
    "measure": "loss",
    "dense": 2.0,
    "ratios": [0.25, 0.5, 0.75],
    "groups": {
        "model.10": [2.1, 2.2, 2.6],
        "model.2.cv1a": [1.999, 2.0, 2.003],
        "model.2.cv1b": [2.5, 3.5, 6.0],
        "model.3": [2.0, 2.0, float("nan")],
        "model.4": [2.0, 2.0, 2.0],
        "model.5": [2.01, 2.01, 2.01],
        "model.6": [1.0, 1.0, 1.0],
    },
    "caps": {"model.2.cv1b": 0.25, "model.4": None},
    "images": 64,
}
MAP = {
    "measure": "map50_95",
    "dense": 0.6,
    "ratios": [0.5],
    "groups": {"a": [0.59], "b": [0.1], "c": [0.61]},
    "caps": {},
    "images": 8,
}
PRUNE = {
    "stage": "prune",
    "compute_gflops": 4.0,
    "kept_flops": 0.5,
    "map50_95_after_cut": 0.03,
    "map50_95_after_bn": 0.45,
    "map50_95": 0.594,
    "epochs": 30,
}
BASELINE = {"stage": "baseline", "compute_gflops": 8.0, "map50_95": 0.6}
LATENCY = {"latency_target_ms": 5.0, "latency_measured_ms": 4.873, "latency_runtime": "openvino"}
FILES = {
    "flops.json": json.dumps(FLOPS),
    "sensitivity.json": json.dumps(LOSS),
    "results.csv": "epoch,metrics/mAP50-95(B)\n1,\n2,0.5\n3,\n4,0.55\n",
}


def document(prune: dict[str, Any] | None = None, **figures: Any) -> dict[str, Any]:
    chain = [{"stage": "teacher", "map50_95": 0.7}, BASELINE, PRUNE if prune is None else prune]
    return built([], chain=chain, **figures)


def drawn(folder: Path, description: str, **figures: Any) -> str:
    """Return the wide variant of the chart whose description starts with `description`."""
    page = write(document(**figures), [], folder)["html"].read_text("utf-8")
    found = re.search(rf'<svg [^>]*aria-label="{description}.*?</svg>', page, re.DOTALL)
    assert found is not None, f"no chart of {description!r}"
    return found[0]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


# table


def test_map_at_each_step_is_against_the_stage_before_and_not_the_teacher() -> None:
    assert [line.cells for line in pruning_table(document()).lines] == [
        ("GFLOPs", "8.00", "4.00", "50.0 %"),
        ("mAP50-95 after the cut", "0.600", "0.030", "5.0 %"),
        ("mAP50-95 after re-estimating BatchNorm, before any training", "0.600", "0.450", "75.0 %"),
        ("mAP50-95 after fine-tuning, 30 epochs", "0.600", "0.594", "99.0 %"),
    ]


def test_a_latency_is_shown_beside_its_target() -> None:
    line = pruning_table(document({**PRUNE, **LATENCY})).lines[-1]
    assert line.cells == ("Latency p50 on OpenVINO, ms (target 5.00)", DASH, "4.87", DASH)


def test_removed_bottlenecks_are_counted_and_their_layers_named() -> None:
    counts = {"model.2": [1, 1], "model.4": [2, 1], "model.6": [2, 0]}
    table = pruning_table(document({**PRUNE, "bottlenecks": counts}))
    assert table.lines[1].cells == ("Bottlenecks", "5", "2", "40.0 %")
    assert "Layers with fewer bottlenecks: model.4 2 → 1, model.6 2 → 0." in table.notes


def test_what_was_not_measured_has_no_line() -> None:
    untrained = pruning_table(document({**PRUNE, "epochs": 0}))
    assert "fine-tuning" not in str(untrained.lines) and len(untrained.lines) == 3
    assert pruning_table(document({"stage": "prune", "map50_95": 0.5})).lines == ()
    assert pruning_table(built([], chain=[BASELINE])).lines == ()


def test_pruning_is_a_section_of_both_forms(tmp_path: Path) -> None:
    paths = write(document(sensitivity=LOSS), [], tmp_path)
    markdown, page = (paths[kind].read_text("utf-8") for kind in ("md", "html"))
    assert "## Pruning\n" in markdown and '<h2 id="pruning">' in page
    assert "| mAP50-95 after re-estimating BatchNorm, before any training | 0.600 | 0.450 | 75.0 % |" in markdown
    for text in (markdown, page):
        assert "Before is the result of baseline." in text
        assert "model.3 (not a number), model.2.cv1b (+2.000), model.10 (+0.300), model.5 (+0.010)" in text
    assert "## Pruning" not in render_markdown(document({"stage": "prune"}))


# FLOPs


def test_flops_are_summed_by_block_and_the_head_by_branch(tmp_path: Path) -> None:
    names_and_labels = texts(drawn(tmp_path, "MMACs of each block", flops=FLOPS))
    assert names_and_labels == [
        *("model.2", "model.10", "model.22.cv2", "model.22.cv3"),
        *("4.00 → 2.00 (50 %)", "40.0 → 10.0 (25 %)", "8.00 → 2.00 (25 %)", "1.00"),
    ]


def test_every_convolution_has_a_bar_of_its_own(tmp_path: Path) -> None:
    shown = texts(drawn(tmp_path, "MMACs of each convolution", flops=FLOPS))
    assert shown[:5] == in_order(layer.removesuffix(".conv") for layer in FLOPS)
    assert shown[5:] == ["1.00", "3.00 → 1.00 (33 %)", "40.0 → 10.0 (25 %)", "8.00 → 2.00 (25 %)", "1.00"]


# sensitivity


def test_the_most_sensitive_come_first_and_a_loss_that_is_no_number_before_all() -> None:
    found = document(sensitivity=LOSS)["sensitivity"]["most_sensitive"]
    assert [entry["group"] for entry in found] == ["model.3", "model.2.cv1b", "model.10", "model.5", "model.2.cv1a"]
    assert found[0]["mean_change"] is None and found[1]["mean_change"] == pytest.approx(2.0)
    by_map = document(sensitivity=MAP)["sensitivity"]["most_sensitive"]
    assert [entry["group"] for entry in by_map] == ["b", "a"], "mAP is worse where it falls; c rose"


def test_cells_hold_the_change_from_the_unpruned_model(tmp_path: Path) -> None:
    shown = texts(drawn(tmp_path, "Change of the loss or mAP", sensitivity=LOSS))
    assert shown[:4] == ["25 %", "50 %", "75 %", "cap"]
    assert shown[4:11] == in_order(LOSS["groups"])
    cells = shown[11:]
    assert cells[:7] == ["-0.001", "+0.000", "+0.003", "+0.500", "+1.500", "+4.000", "25 %"]
    assert cells[7:10] == ["+0.000", "+0.000", DASH], "model.3 at 75 %"
    assert "cap" not in texts(drawn(tmp_path, "Change of the loss or mAP", sensitivity=MAP))


@pytest.mark.parametrize(
    ("figures", "harms"),
    [
        (LOSS, [0.003, 0.5, 1.5, 4, 4, 0.01, 0.01, 0.01, 0.1, 0.2, 0.6]),  # the second 4 is what is not a number
        (MAP, [0.01, 0.5]),
    ],
)
def test_only_harm_is_coloured_by_its_square_root_and_the_worst_is_the_deepest(
    tmp_path: Path, figures: dict[str, Any], harms: list[float]
) -> None:
    svg = drawn(tmp_path, "Change of the loss or mAP", sensitivity=figures)
    depths = [float(depth) for depth in re.findall(r"fill: var\(--bad\); fill-opacity: ([\d.]+)", svg)]
    assert depths == pytest.approx([0.55 * (harm / max(harms)) ** 0.5 for harm in harms], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "map50"}, "is of 'map50', expected one of loss, map50_95"),
        ({"dense": float("nan")}, "the model before pruning has loss nan"),
        ({"ratios": [0.5, 0.25, 0.75]}, r"ratios \[0.5, 0.25, 0.75\]"),
        ({"ratios": []}, r"ratios \[\]"),
        ({"ratios": [0.5, 0.75, 1.0]}, "shares between 0 and 1"),
        ({"groups": {"model.1": [2.0]}, "caps": {}}, "model.1 has 1 values, expected 3"),
        ({"caps": {"model.99": 0.5}}, "caps model.99, which was not measured"),
        ({"caps": {"model.4": 50}}, "caps model.4 at 50, expected a share"),
    ],
)
def test_malformed_sensitivity_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        document(sensitivity={**LOSS, **changes})


def test_a_sensitivity_without_its_measure_is_refused() -> None:
    with pytest.raises(RecipeError, match="sensitivity lacks measure, dense, images"):
        document(sensitivity={key: LOSS[key] for key in ("ratios", "groups", "caps")})


# recovery


def test_one_validated_epoch_makes_no_curve_and_two_do(tmp_path: Path) -> None:
    shown = texts(drawn(tmp_path, "mAP50-95 over the epochs", recovery=[(1, 0.4), (2, float("nan")), (30, 0.59)]))
    assert {"0.400", "0.590", "epoch of fine-tuning"} <= set(shown)
    assert "over the epochs" not in write(document(recovery=[[30, 0.59]]), [], tmp_path)["html"].read_text("utf-8")


def test_malformed_pairs_and_epochs_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"FLOPs of model.1 are \[5\], expected \[before, after\]"):
        document(flops={"model.1": [5]})
    with pytest.raises(RecipeError, match=r"channels of model.1 are \[8, 9\]"):
        document(channels={"model.1": [8, 9]})
    with pytest.raises(RecipeError, match="after epoch 2, expected"):
        document(recovery=[[2, 0.5], [2, 0.6]])
    assert all(document()[key] is None for key in ("flops", "sensitivity", "recovery"))


# stage


def job(folder: Path, files: dict[str, str], name: str = "prune") -> Any:
    for file, text in files.items():
        (folder / file).write_text(text)
    manifest = Manifest(1, name, 1, "f", {}, {}, {file: {} for file in files}, PRUNE | LATENCY, {}, 1.0, "")
    return SimpleNamespace(inputs={"prune": Artifact(folder, manifest)})


def test_the_stage_reads_what_pruning_left(tmp_path: Path) -> None:
    pruned = job(tmp_path, FILES)
    assert stage._prune_file(pruned, "flops.json") == FLOPS
    assert stage._prune_file(pruned, "sensitivity.json")["caps"] == LOSS["caps"]
    assert stage._recovery(pruned) == [(2, 0.5), (4, 0.55)]


@pytest.mark.parametrize(("files", "name"), [({}, "prune"), (FILES, "sparsify")])
def test_the_stage_feeds_nothing_where_pruning_left_nothing_or_is_another_stage(
    tmp_path: Path, files: dict[str, str], name: str
) -> None:
    other = job(tmp_path, files, name)
    assert stage._prune_file(other, "flops.json") is None and stage._recovery(other) == []
