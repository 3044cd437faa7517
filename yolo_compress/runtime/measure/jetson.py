"""State of a Jetson that affects latency (JetPack, power mode, clocks), and its power from the INA3221 rails or tegrastats.

Values that cannot be read are left out, never guessed. Paths and output formats are from NVIDIA's documentation and the source of
jtop. This file never ran on a Jetson. `root` is put before every path, for tests.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, cast

from .device import DeviceState, ask, device_state, read_line

RAILS = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"
CLOCKS = {
    "gpu_hz": ("sys/class/devfreq/*gpu*/cur_freq", "sys/class/devfreq/*.g?[0-9]*b/cur_freq"),
    "gpu_max_hz": ("sys/class/devfreq/*gpu*/max_freq", "sys/class/devfreq/*.g?[0-9]*b/max_freq"),
    "emc_hz": (
        "sys/kernel/debug/bpmp/debug/clk/emc/rate",
        "sys/kernel/debug/clk/emc/clk_rate",
    ),  # readable by root only
    "cpu_khz": ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",),
    "cpu_max_khz": ("sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",),
}
# Rails that supply the whole module. Without such a rail, the power is the sum of all rails (jtop's rule).
TOTAL = ("VDD_IN", "POM_5V_IN")
UNUSED = ("NC",)
INTERVAL_S = 0.1
_TEGRASTATS = re.compile(
    r"\b([A-Z][A-Z0-9_]*) (\d+)(mW)?/(\d+)(mW)?"
)  # "VDD_IN 4561mW/4412mW", L4T 32: "POM_5V_IN 3000/3010"
_POWER_NAME = re.compile(r"VDD|POM|VIN|^(GPU|CPU|SOC|CV|VDDRQ|SYS5V)$")


class JetsonState(DeviceState, total=False):
    """`DeviceState` with the clocks and the JetPack version of a Jetson."""

    clocks: Dict[str, int]  # key of `CLOCKS` -> Hz or kHz, as its name says
    jetpack: str  # version of JetPack


class Rail(NamedTuple):
    """A measured power rail: its name, and the files of its voltage and current."""

    name: str
    millivolts: Path
    milliamperes: Path


def state(root: Path = Path("/")) -> JetsonState:
    """Return the result of `device_state`, with the JetPack version and the clocks of a Jetson added."""
    found: Dict[str, object] = dict(device_state(), clocks=clocks(root))
    found["jetpack"] = ask(["dpkg-query", "--showformat=${Version}", "--show", "nvidia-jetpack"])
    return cast(JetsonState, {key: value for key, value in found.items() if value})


def clocks(root: Path = Path("/")) -> Dict[str, int]:
    """Return the present clocks of GPU, memory and processor, by the keys of `CLOCKS`. Unreadable clocks are left out."""
    found = {}
    for name, patterns in CLOCKS.items():
        for pattern in patterns:
            texts = [read_line(str(path)) for path in sorted(root.glob(pattern))]
            numbers = [int(text) for text in texts if text and text.isdigit()]
            if numbers:
                found[name] = numbers[0]
                break
    return found


def rails(root: Path = Path("/")) -> List[Rail]:
    """Return the power rails that add up to the board's power. The list is empty if no INA3221 channel is readable."""
    found = []
    for folder in sorted(root.glob(RAILS)):
        for channel in (1, 2, 3):  # 4 to 6 are shunt voltages, 7 their sum
            name = read_line(str(folder / f"in{channel}_label"))
            one = Rail(name or "", folder / f"in{channel}_input", folder / f"curr{channel}_input")
            if name and name not in UNUSED and read_line(str(one.millivolts)) and read_line(str(one.milliamperes)):
                found.append(one)
    total_rails = [rail for total in TOTAL for rail in found if rail.name == total]
    return total_rails[:1] or found


def rail_watts(measured: List[Rail]) -> Optional[float]:
    """Return the present power of the rails, in watts. None: a rail cannot be read."""
    total = 0.0
    for rail in measured:
        volts, amperes = read_line(str(rail.millivolts)), read_line(str(rail.milliamperes))
        if volts is None or amperes is None:
            return None
        total += int(volts) * int(amperes) / 1e6
    return total


def tegrastats_watts(text: str) -> Optional[float]:
    """Return the power in a line of tegrastats, in watts: the total, else the sum of the rails. None: the line has no power."""
    found: Dict[str, float] = {}
    for name, now, unit, _, _ in _TEGRASTATS.findall(text):
        if _POWER_NAME.search(name) and name not in UNUSED and (unit or name.startswith(("VDD", "POM", "VIN"))):
            found[name] = int(now) / 1000
    for total in TOTAL:
        if total in found:
            return found[total]
    return sum(found.values()) if found else None


class Meter:
    """Measure the power while other code runs: `with meter: ...`, then `meter.mean()`.

    Attributes:
        source: where the power is read from. None: it cannot be measured.
    """

    def __init__(self, root: Path = Path("/"), interval_s: float = INTERVAL_S) -> None:
        self._rails, self._interval_s = rails(root), interval_s
        self.source: Optional[str] = None
        if self._rails:
            self.source = "ina3221: " + " + ".join(rail.name for rail in self._rails)
        elif shutil.which("tegrastats"):
            self.source = "tegrastats"
        self._samples: List[float] = []
        self._over = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def __enter__(self) -> "Meter":
        self._samples, self._over = [], threading.Event()
        if self.source is not None:
            self._thread = threading.Thread(
                target=self._rail_loop if self._rails else self._tegrastats_loop, daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def mean(self) -> Optional[float]:
        """Return the mean power during the last `with` block, in watts. None: there is no sample."""
        return sum(self._samples) / len(self._samples) if self._samples else None

    def idle(self, seconds: float) -> Optional[float]:
        """Return the mean power while this process sleeps, in watts. None: power cannot be measured."""
        if self.source is None:
            return None
        with self:
            time.sleep(seconds)
        return self.mean()

    def _rail_loop(self) -> None:
        while not self._over.wait(self._interval_s):
            self._add_sample(rail_watts(self._rails))

    def _tegrastats_loop(self) -> None:
        command = ["tegrastats", "--interval", str(int(self._interval_s * 1000))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
        stop: Callable[[], Any] = process.terminate
        watch = threading.Thread(target=lambda: (self._over.wait(), stop()), daemon=True)
        watch.start()
        assert process.stdout is not None
        with process.stdout as lines:
            for text in lines:
                if self._over.is_set():
                    break
                self._add_sample(tegrastats_watts(text))
        self._over.wait()
        watch.join()
        process.wait()

    def _add_sample(self, watts: Optional[float]) -> None:
        if watts is not None:
            self._samples.append(watts)
