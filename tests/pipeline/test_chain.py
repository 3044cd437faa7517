"""The whole chain, once, and what a second command does: claims of the README, on a few images."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from pydantic import ValidationError

from tests.pipeline.conftest import BASELINE, IMGSZ, Bench, recipe
from tests.support.report_schema import validate as validate_report
from tests.support.stage_schema import METRICS, check
from tests.support.typed import validate
from yolo_compress.chain import STAGES
from yolo_compress.evaluate.exported_files import made_for
from yolo_compress.prune import masks
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRAINED = ("baseline", "sparsify", "prune", "distill", "qat")


def artifact(bench: Bench, stage: str, name: str = "tiny"):
    found = Store(bench.folder / "weights").linked(name, stage)
    assert found is not None, stage
    return found


def test_metrics_and_files_are_of_their_types(chain: Bench) -> None:
    found = {stage: check(artifact(chain, stage)) for stage in STAGES if stage != "teacher"}
    assert {stage: files for stage, files in found.items() if files} == {
        "prune": {"channels.json", "flops.json"},
        "qat": {"calibration.json"},
        "export": {"calibration.json"},
        "engine": {"engines.json"},
        "bench": {"latency.json"},
    }


def test_a_key_without_a_type_is_found(finished: Bench) -> None:
    for stage, kind in METRICS.items():
        if stage != "teacher":
            metrics = artifact(finished, stage).metrics
            for wrong in ({**metrics, "new": 1}, dict(list(metrics.items())[1:])):
                with pytest.raises(ValidationError):
                    validate(wrong, kind)


def test_every_stage_published_and_vouched_for(finished: Bench) -> None:
    store = Store(finished.folder / "weights")
    for stage in STAGES:
        if stage != "teacher":  # the recipe has none: the baseline takes its place
            store.verify(artifact(finished, stage))
    assert not list((finished.folder / "weights" / "store").glob("*.partial"))


def test_pruned_widths_survive_to_the_end_in_stock_classes(finished: Bench) -> None:
    base, pruned, distilled, quantised = (
        checkpoint.load_model(artifact(finished, stage).file("model.pt"))
        for stage in ("baseline", "prune", "distill", "qat")
    )
    assert (
        checkpoint.widths(pruned)
        == checkpoint.widths(distilled)
        == checkpoint.widths(quantised)
        != checkpoint.widths(base)
    )
    metrics = artifact(finished, "prune").metrics
    assert metrics["kept_flops"] == pytest.approx(0.7, abs=0.02 * 0.7)
    assert metrics["compute_gflops"] / artifact(finished, "baseline").metrics["compute_gflops"] == pytest.approx(
        metrics["kept_flops"], abs=1e-6
    )


def test_the_report_compares_what_bench_kept(chain: Bench) -> None:
    """All that mAP counts was kept: the A/B document gives the rows' figures again."""
    measured = {
        f"{row['model']}-{row['runtime']}-{row['precision']}": row for row in artifact(chain, "bench").metrics["rows"]
    }
    report = artifact(chain, "report")
    gate = report.metrics["gate"]
    found = json.loads(report.file("ab.json").read_text())
    assert found == json.loads(report.file("report.json").read_text())["ab"]
    assert (found["a"]["row"], found["b"]["row"]) == (gate["reference"], gate["worst"])
    for side in "ab":
        row = measured[found[side]["row"]]
        assert found["map50_95"][side] == pytest.approx(row["map50_95"], abs=1e-9)
        assert found["map50"][side] == pytest.approx(row["map50"], abs=1e-9)
    latency, judged = found["latency"], measured[gate["timed"]]
    peer = measured[latency["a"]["row"]]
    assert (peer["model"], peer["precision"], peer["runtime"]) == ("original", "fp32", judged["runtime"])
    assert latency["a_p50_ms"] == pytest.approx(peer["latency_p50_ms"], rel=1e-6)
    assert latency["b_p50_ms"] == pytest.approx(judged["latency_p50_ms"], rel=1e-6)
    check = next(check for check in gate["checks"] if check["name"] == "signature")
    assert check["passed"] and check["value"]["imgsz"] == [IMGSZ, IMGSZ]
    assert set(gate["tiers"] or {"95": 0, "99": 0, "99.9": 0}) == {"95", "99", "99.9"}


def test_controls_lack_one_part_of_the_chain_each(finished: Bench) -> None:
    control, pruned = artifact(finished, "control"), artifact(finished, "prune")
    longer, taught, narrowed = (control.metrics["models"][net] for net in ("longer", "taught", "narrowed"))
    assert taught["epochs"] == narrowed["epochs"] == 4, "one of sparsify, two of prune, one of distill"
    assert taught["parameters"] == artifact(finished, "baseline").metrics["parameters"]
    assert narrowed["compute_gflops"] == pytest.approx(pruned.metrics["compute_gflops"], rel=0.02)
    steps = json.loads(artifact(finished, "report").file("report.json").read_text())["control"]["steps"]
    assert [step["name"] for step in steps] == ["baseline", "longer", "taught", "narrowed", "compressed"]
    assert [step["map50_95"] for step in steps[1:4]] == [net["map50_95"] for net in (longer, taught, narrowed)]
    assert sum(step["change"] for step in steps[1:]) == pytest.approx(steps[4]["map50_95"] - steps[0]["map50_95"])


def test_losses_of_the_hooks_are_in_results_csv(finished: Bench) -> None:
    def columns(stage: str) -> list[str]:
        return artifact(finished, stage).file("results.csv").read_text().split("\n")[0].split(",")

    assert {"train/kd_feature", "train/kd_class"} <= set(columns("distill"))
    assert {"train/kd_feature", "train/kd_class"} <= set(columns("qat"))
    assert "gamma_mean" in columns("sparsify")


@pytest.mark.fault(40)
def test_exports_agree_with_torch_and_with_the_plan(finished: Bench) -> None:
    exported = artifact(finished, "export")
    for model in ("original", "compressed"):
        metrics = exported.metrics[model]
        assert metrics["max_score_difference"] <= 1e-4
        graph = onnx.load(exported.file(f"{model}/int8.onnx")).graph
        quantised = [
            node for node in graph.node if node.op_type == "Conv" and "Dequantize" in _producer(graph, node.input[0])
        ]
        assert len(quantised) == metrics["int8_convs"] == artifact(finished, "qat").metrics["quantised_convs"]
        assert int8_convs(exported.file(f"{model}/int8.torchscript")) == metrics["int8_convs"]
    assert exported.metrics["compressed"]["int8_from"] == "qat"
    assert exported.metrics["original"]["int8_from"].startswith("ptq")


def int8_convs(file: Path) -> int:
    """Of a TorchScript file, which has to run, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated
        traced = torch.jit.load(str(file))
    with torch.no_grad():
        assert bool(torch.isfinite(traced(torch.rand(1, 3, IMGSZ, IMGSZ))).all())
    return [node.kind() for node in traced.inlined_graph.nodes()].count("quantized::conv2d")


def _producer(graph: onnx.GraphProto, tensor: str) -> str:
    return next((node.op_type for node in graph.node if tensor in node.output), "")


def test_rows_compare_both_models_in_three_precisions_on_one_image_set(chain: Bench) -> None:
    rows = artifact(chain, "bench").metrics["rows"]
    measured = {(row["model"], row["runtime"], row["precision"]) for row in rows if row["status"] == "ok"}
    for runtime in ("onnxruntime", "openvino"):
        for model in ("original", "compressed"):
            assert {(model, runtime, precision) for precision in ("fp32", "fp16", "int8")} <= measured
    assert len({row["image_set"] for row in rows if row["status"] == "ok"}) == 1
    measured_rows = [row for row in rows if row["status"] == "ok"]
    float_rows = [row for row in measured_rows if row["model"] == "original" and row["precision"] == "fp32"]
    assert max(r["map50_95"] for r in float_rows) - min(r["map50_95"] for r in float_rows) < 1e-3
    assert all(row["latency_p50_ms"] > 0 and row["latency_p99_ms"] is None for row in rows if row["status"] == "ok")


def test_what_goes_to_the_robot_is_what_is_judged(finished: Bench) -> None:
    """Each network that is published has its mAP; the forms of INT8 hold the codes that QAT trained, and so its accuracy."""
    exported, gate = artifact(finished, "export"), artifact(finished, "report").metrics["gate"]
    rows = [row for row in artifact(finished, "bench").metrics["rows"] if row["status"] != "missing"]
    networks = {file for file in exported.manifest.files if made_for(file)}
    assert networks == {row["file"] for row in rows} - {None} and all(row["image_set"] for row in rows)
    int8 = {f"{row['model']}-{row['runtime']}-int8" for row in rows if "compressed/int8" in (row["file"] or "")}
    assert int8 == {entry["id"] for entry in gate["judged"]} and len(int8) == 7
    trained = artifact(finished, "qat").metrics["map50_95"]
    both = {row["status"]: row for row in rows if row["file"] == "compressed/int8.onnx"}
    assert "simulated" in both["untimed"]["executed"], "NCNN takes TensorRT's file, and is no engine of TensorRT"
    assert both["ok"]["runtime"] == "ncnn"
    assert [row["map50_95"] for row in both.values()] == pytest.approx([trained] * 2, abs=0.01)


def test_report_is_one_file_without_network_or_paths(finished: Bench) -> None:
    html = artifact(finished, "report").file("report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert str(finished.folder) not in html
    assert json.loads(artifact(finished, "report").file("report.json").read_text())["schema"] == 3


def test_report_holds_the_evidence_and_takes_a_robot_beside(finished: Bench) -> None:
    published = artifact(finished, "report")
    before = published.file("report.html").read_bytes()
    report = json.loads(published.file("report.json").read_text())
    validate_report(report)
    measured = [row["id"] for row in report["rows"] if row["status"] == "ok"]
    assert set(report["latency_quantiles"]) == set(measured)
    assert {"a", "b", "shown_a", "shown_b", "conf"} == set(report["errors"])
    assert all({"map50_95_low", "map50_95_high"} <= set(stage) for stage in report["chain"]), (
        "every stage has its interval"
    )
    assert len(report["placement"]) > 50
    row = {"model": "compressed", "runtime": "tensorrt", "precision": "int8", "status": "ok", "reason": None, "map50_95": 0.0,
           "image_set": report["data"]["image_set"], "latency_p50_ms": 1.0, "latency_n": 700}  # fmt: skip
    onnx = artifact(finished, "export").manifest.files["compressed/int8.onnx"]["sha256"]
    about = {"name": "tiny", "version": 1, "onnx": {"int8": onnx}}
    robot = {"schema": 1, "bundle": about, "device": {"board": "a robot"}, "rows": [row],
             "runtime": "tensorrt", "library": "10.3.0", "golden": None}  # fmt: skip
    (finished.folder / "device.json").write_text(json.dumps(robot))
    done = finished.run("report", "recipe=tiny.yaml", "add=device.json", "out=beside")
    answer = json.loads(done.stdout.splitlines()[-1])
    added = json.loads((finished.folder / "beside" / "report.json").read_text())
    assert answer["report"] == "beside/report.html" and [device["name"] for device in added["devices"]] == ["a robot"]
    assert "compressed-tensorrt-int8-a robot" in [entry["id"] for entry in added["gate"]["judged"]]
    assert published.file("report.html").read_bytes() == before
    about["onnx"] = {"int8": "0" * 64}
    (finished.folder / "device.json").write_text(json.dumps(robot))
    assert "another model" in finished.run("report", "recipe=tiny.yaml", "add=device.json", "out=no", code=2).stderr


def test_manifests_and_checkpoints_hold_no_path(finished: Bench) -> None:
    where = str(finished.folder).encode()
    for stage in TRAINED:
        assert where not in artifact(finished, stage).file("model.pt").read_bytes()
        assert where.decode() not in (artifact(finished, stage).path / "manifest.json").read_text()


def test_second_run_does_nothing_and_answers_in_json(finished: Bench) -> None:
    before = finished.artefacts()
    done = finished.run("qat", "recipe=tiny.yaml")
    assert done.stderr.splitlines() == [f"{stage}: up to date" for stage in TRAINED]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["stage"] == "qat" and answer["metrics"]["quantised_convs"] > 50
    assert finished.artefacts() == before


def test_a_bench_done_again_leaves_no_report_of_the_one_before(finished: Bench) -> None:
    first = artifact(finished, "bench").metrics["rows"]
    finished.run("bench", "recipe=tiny.yaml", "force=true")
    assert "report    stale\n          content of bench: " in finished.run("status", "recipe=tiny.yaml").stdout
    finished.run("report", "recipe=tiny.yaml")
    again = artifact(finished, "bench").metrics["rows"]
    assert again != first
    shown = json.loads(artifact(finished, "report").file("report.json").read_text())["rows"]
    assert {row.get("latency_p50_ms") for row in shown} == {row.get("latency_p50_ms") for row in again}


def test_a_changed_knob_makes_its_stage_and_later_ones_stale(finished: Bench) -> None:
    done = finished.run("status", "recipe=tiny.yaml", "qat.epochs=2")
    states = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert [stage for stage, state in states.items() if state == "up to date"] == [
        "baseline",
        "sparsify",
        "prune",
        "distill",
        "control",
    ]
    assert [stage for stage, state in states.items() if state == "stale"] == [
        "qat",
        "export",
        "engine",
        "bench",
        "report",
    ]
    assert "qat.epochs: 1 -> 2" in done.stdout


def test_status_imports_no_torch(finished: Bench) -> None:
    code = (
        "import sys; from yolo_compress.cli.main import main; main(['status', 'recipe=tiny.yaml']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished.folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_gc_keeps_what_friendly_names_lead_to(finished: Bench) -> None:
    before = finished.artefacts()
    orphan = finished.folder / "weights" / "store" / "qat-0123456789abcdef.partial"
    orphan.mkdir()
    finished.run("gc")
    assert finished.artefacts() == before and not orphan.exists()


@pytest.mark.fault(23)
def test_an_altered_artefact_is_refused_before_use(finished: Bench, tmp_path: Path) -> None:
    file = artifact(finished, "distill").file("model.pt")
    kept = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(kept[:-100] + bytes(100))
    try:
        done = finished.run("qat", "recipe=tiny.yaml", "qat.epochs=3", code=5)
        assert "model.pt" in done.stderr and "Traceback" not in done.stderr
    finally:
        file.write_bytes(kept)


def test_stock_ultralytics_loads_the_pruned_checkpoint_under_safe_load(finished: Bench) -> None:
    ours = checkpoint.load_model(artifact(finished, "prune").file("model.pt"))
    # float64: in float32 the number of threads, which differs between processes, moves the sum by 4e-9
    image = torch.linspace(0, 1, 3 * 64 * 64, dtype=torch.float64).reshape(1, 3, 64, 64)
    code = (
        "import sys, torch; sys.modules['yolo_compress'] = None\n"
        "from ultralytics import YOLO\n"
        "image = torch.linspace(0, 1, 3 * 64 * 64, dtype=torch.float64).reshape(1, 3, 64, 64)\n"
        "with torch.no_grad(): print(repr(YOLO(sys.argv[1]).model.double().eval()(image)[0].sum().item()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(artifact(finished, "prune").file("model.pt"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "ULTRALYTICS_SAFE_LOAD": "1", "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false"},
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert float(done.stdout.split()[-1]) == pytest.approx(ours.double()(image)[0].sum().item(), rel=1e-9)


def test_zeros_are_held_through_the_chain_and_the_report_is_honest_about_them(finished: Bench) -> None:
    pruned = {"kind": "two_four", "epochs": 1, "batch": 8, "calib_images": 16}
    files = {"calib_images": 8, "precisions": ["fp32", "int8"], "torchscript": False}
    recipe(finished.folder, "zeros", baseline=BASELINE, sparsify=None, prune=pruned, export=files)
    assert "baseline: up to date" in finished.run("run", "recipe=zeros.yaml").stderr
    zeros = {}
    for stage in ("prune", "distill", "qat"):
        found = artifact(finished, stage, "zeros")
        model = checkpoint.load_model(found.file("model.pt"))
        zeros[stage] = {name: model.get_submodule(name).weight == 0 for name in masks.convolutions(model)}
        assert found.metrics["sparsity"] > 0.49, stage
        check(found)
    assert all(float(part.float().mean()) == 0.5 for part in zeros["prune"].values())
    for stage in ("distill", "qat"):
        assert all(torch.equal(part, zeros["prune"][name]) for name, part in zeros[stage].items()), stage
    said = (artifact(finished, "report", "zeros").path / "report.md").read_text()
    assert all(f"{name} computes these zeros as dense" in said for name in ("ONNX Runtime", "OpenVINO on a CPU"))
    share = artifact(finished, "qat", "zeros").metrics["sparsity"]
    assert f"{share:.1%} of the convolution weights are exactly zero (2:4)" in said and "SPARSE" in said


def test_left_out_stages_pass_their_input_through(bench: Bench) -> None:
    recipe(bench.folder, "float", sparsify=None, distill=None, qat=None, prune={"epochs": 0, "keep_flops": 0.7},
           engine=None, bench=None, report=None)  # fmt: skip
    done = bench.run("export", "recipe=float.yaml")
    assert json.loads(done.stdout.splitlines()[-1])["metrics"]["compressed"]["int8_from"].startswith("ptq")
    assert {name.split("-")[0] for name in bench.artefacts()} == {"baseline", "prune", "export"}


def test_qat_without_epochs_is_calibration_only(chain: Bench) -> None:
    done = chain.run("qat", chain.namesake("calibrated"), "qat.epochs=0")
    metrics = json.loads(done.stdout.splitlines()[-1])["metrics"]
    distilled = artifact(chain, "distill").metrics
    assert distilled["map50_95"] > 0
    assert metrics["map50_95_float_weights"] == pytest.approx(distilled["map50_95"], abs=1e-9)


def test_groups_that_int8_hurts_stay_in_float_down_to_the_files(finished: Bench) -> None:
    """A drop that nothing but float allows: every group that gives something back is left out, and its convolutions with it."""
    knobs = (
        "qat.epochs=0",
        "qat.sensitivity=loss",
        "qat.max_drop=1e-9",
        "export.calibration_cache=true",
        "export.nms=true",
    )
    exported = json.loads(finished.run("export", finished.namesake("groups"), *knobs).stdout.splitlines()[-1])
    quantised = artifact(finished, "qat", "groups")
    assert check(quantised) >= {"sensitivity.json"}
    check(artifact(finished, "export", "groups"))
    found = json.loads(quantised.file("sensitivity.json").read_text())
    placed = list(csv.DictReader(quantised.file("placement.csv").read_text().splitlines()))
    left = {row["group"] for row in placed if "as asked" in row["why"]}
    assert left == set(quantised.metrics["float_groups"]) == set(found["left"])
    assert found["then"] <= found["int8"] and quantised.metrics["sensitivity_enough"] == (
        found["then"] <= found["worst"]
    )
    assert (
        bool(left) == any(loss < found["int8"] for loss in found["groups"].values()) or found["int8"] <= found["worst"]
    )
    ranked = list(csv.DictReader(quantised.file("sensitivity.csv").read_text().splitlines()))
    gains = [float(row["gives_back"]) for row in ranked[2:]]
    assert gains == sorted(gains, reverse=True) and len(gains) == len(found["groups"])
    folder = finished.folder / exported["artifact"] / "compressed"
    graph = onnx.load(str(folder / "int8.onnx")).graph
    int8 = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.name.endswith(".weight_DQ")]
    assert len(int8) == quantised.metrics["quantised_convs"] == exported["metrics"]["compressed"]["int8_convs"]
    assert int8_convs(folder / "int8.torchscript") == len(int8)
    names = {name for node in onnx.load(str(folder / "int8-implicit.onnx")).graph.node for name in node.output}
    for file in ("fp32", "int8-tensorrt11", "int8-onnxruntime"):
        rows = onnx.load(str(folder / f"{file}-nms.onnx")).graph.output[0].type.tensor_type.shape.dim
        assert [size.dim_value for size in rows] == [1, 300, 6]
    head, *lines = (folder / "int8-implicit.cache").read_text().splitlines()
    assert head.startswith("TRT-") and {line.rpartition(": ")[0] for line in lines} <= names | {"images"}


def test_a_dry_run_shows_what_prune_then_does(finished: Bench) -> None:
    before = finished.artefacts()
    done = finished.run("prune", "recipe=tiny.yaml", "dry_run=true")
    plan = json.loads(done.stdout.splitlines()[-1])
    pruned = artifact(finished, "prune")
    assert plan["widths"] == json.loads(pruned.file("channels.json").read_text())
    assert plan["gflops"][1] == pytest.approx(pruned.metrics["compute_gflops"])
    assert plan["parameters"][1] == pruned.metrics["parameters"]
    assert "model.22.cv3.2.1" in done.stdout and finished.artefacts() == before


def test_a_probe_is_what_a_robot_times(finished: Bench) -> None:
    finished.run("probe", "recipe=tiny.yaml", "out=probe")
    described = json.loads((finished.folder / "probe" / "layers.json").read_text())
    assert [network["file"] for network in described["networks"]] == ["100.onnx", "075.onnx", "050.onnx", "025.onnx"]
    refused = [("out=probe", "the folder is not empty"), ("prune=null", "has no section `prune:`")]
    for word, message in refused:
        words = [word] if word.startswith("out") else [word, "out=other"]
        assert message in finished.run("probe", "recipe=tiny.yaml", *words, code=2).stderr


def test_rounds_with_sensitivity_meet_the_budget_and_keep_their_tables(finished: Bench) -> None:
    finished.run("prune", finished.namesake("rounds"), "prune.rounds=2", "prune.sensitivity=loss", "prune.keep_flops=0.5",
                 "prune.max_drop=10")  # fmt: skip
    pruned = artifact(finished, "prune", "rounds")
    assert pruned.metrics["kept_flops"] == pytest.approx(0.5, abs=0.02 * 0.5)
    assert [row.split(",")[0] for row in pruned.file("results.csv").read_text().splitlines()] == ["epoch", "1", "2"]
    macs = json.loads(pruned.file("flops.json").read_text())
    shares = [sum(pair[side] for pair in macs.values()) for side in (0, 1)]
    assert shares[1] / shares[0] == pytest.approx(pruned.metrics["kept_flops"])
    assert check(pruned) >= {"sensitivity.json"}
    found = json.loads(pruned.file("sensitivity.json").read_text())
    assert set(found["groups"]) == set(found["caps"]) and len(found["groups"]) > 40
    assert pruned.file("sensitivity.csv").read_text().count("\n") == 2 + len(found["groups"])
