"""Power and clocks from a drawn sysfs and from lines of tegrastats, as NVIDIA's boards give them; nothing here ran on one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.support.typed import validate
from yolo_compress.runtime.measure import jetson
from yolo_compress.runtime.measure.jetson import Meter, clocks, rail_watts, rails, tegrastats_watts

ORIN_NX = (
    "11-25-2026 10:00:00 RAM 3021/15523MB (lfb 5x4MB) SWAP 0/7761MB (cached 0MB) CPU [2%@729,0%@729,off,off] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 41%@[611] cpu@45.1C gpu@43.2C VDD_IN 4561mW/4412mW VDD_CPU_GPU_CV 652mW/640mW VDD_SOC 1343mW/1340mW"
)
ORIN_AGX = (
    "RAM 1/2MB GR3D_FREQ 0% VDD_GPU_SOC 2400mW/2400mW VDD_CPU_CV 400mW/420mW VIN_SYS_5V0 3000mW/3010mW NC 0mW/0mW"
)
XAVIER_AGX = "RAM 1/2MB CPU [1%@1190] GPU 310mW/310mW CPU 620mW/620mW SOC 930mW/930mW CV 0mW/0mW VDDRQ 155mW/155mW SYS5V 1405mW/1405mW"
NANO = "RAM 1/2MB SWAP 0/1MB POM_5V_IN 2532/2532 POM_5V_GPU 81/81 POM_5V_CPU 203/203"


@pytest.mark.parametrize(
    ("text", "watts"),
    [
        (ORIN_NX, 4.561),
        (ORIN_AGX, 5.8),
        (XAVIER_AGX, 3.42),
        (NANO, 2.532),
        ("RAM 3021/15523MB SWAP 0/7761MB", None),
        ("", None),
    ],
)
def test_watts_of_a_line_of_tegrastats(text: str, watts: float | None) -> None:
    assert tegrastats_watts(text) == (None if watts is None else pytest.approx(watts))


def board(root: Path, channels: dict[str, tuple[int, int]]) -> Path:
    """sysfs of one INA3221: name -> millivolts, milliamperes."""
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    folder.mkdir(parents=True)
    for number, (name, (volts, amperes)) in enumerate(channels.items(), 1):
        (folder / f"in{number}_label").write_text(name + "\n")
        (folder / f"in{number}_input").write_text(f"{volts}\n")
        (folder / f"curr{number}_input").write_text(f"{amperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("40\n")
    return root


def test_the_rail_through_which_all_power_comes_stands_alone(tmp_path: Path) -> None:
    board(tmp_path, {"VDD_IN": (5000, 900), "VDD_CPU_GPU_CV": (5000, 200), "VDD_SOC": (5000, 300)})
    assert [rail.name for rail in rails(tmp_path)] == ["VDD_IN"] and rail_watts(rails(tmp_path)) == pytest.approx(4.5)


def test_else_the_rails_are_summed_without_the_unused(tmp_path: Path) -> None:
    board(tmp_path, {"VDD_GPU_SOC": (19000, 100), "NC": (0, 0), "VIN_SYS_5V0": (5000, 400)})
    assert [rail.name for rail in rails(tmp_path)] == ["VDD_GPU_SOC", "VIN_SYS_5V0"]
    assert rail_watts(rails(tmp_path)) == pytest.approx(1.9 + 2.0)


def test_a_meter_means_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board(tmp_path, {"VDD_IN": (5000, 900)})
    meter = Meter(tmp_path, interval_s=0.005)
    assert meter.source == "ina3221: VDD_IN" and meter.idle(0.1) == pytest.approx(4.5)
    amperes = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr1_input"
    amperes.write_text("2000\n")
    assert meter.idle(0.1) == pytest.approx(10.0), "samples of an earlier `with` are gone"


def test_tegrastats_where_there_are_no_rails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "tegrastats"
    tool.write_text(f"#!/bin/sh\nwhile true; do echo '{ORIN_NX}'; sleep 0.02; done\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    meter = Meter(tmp_path)
    assert meter.source == "tegrastats" and meter.idle(0.3) == pytest.approx(4.561)


def test_where_nothing_can_be_measured_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    meter = Meter(tmp_path)
    assert meter.source is None and meter.idle(0.01) is None
    with meter:
        pass
    assert meter.mean() is None and clocks(tmp_path) == {}


def test_clocks(tmp_path: Path) -> None:
    for path, text in {
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000",
        "sys/class/devfreq/17000000.gpu/max_freq": "918000000",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600",
        "sys/kernel/debug/bpmp/debug/clk/emc/rate": "2133000000",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    wanted = {"gpu_hz": 306000000, "gpu_max_hz": 918000000, "cpu_khz": 729600, "emc_hz": 2133000000}
    validate(jetson.state(tmp_path), jetson.JetsonState)
    assert clocks(tmp_path) == wanted and jetson.state(tmp_path)["clocks"] == wanted


def test_clocks_of_an_older_name(tmp_path: Path) -> None:
    (tmp_path / "sys/class/devfreq/17000000.ga10b").mkdir(parents=True)
    (tmp_path / "sys/class/devfreq/17000000.ga10b/cur_freq").write_text("306000000\n")
    assert clocks(tmp_path) == {"gpu_hz": 306000000}
