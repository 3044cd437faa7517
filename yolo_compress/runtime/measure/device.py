"""State of the machine that a latency is measured on. Values that cannot be read are left out, never guessed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Optional, TypedDict, cast


class DeviceState(TypedDict, total=False):
    """Identity and power state of a machine. Values that cannot be read are absent."""

    cpu: str  # name of the processor
    cpus: int  # processors that this process may run on
    machine: str  # architecture, "aarch64"
    system: str  # kernel and system
    python: str  # version of Python
    governor: str  # clock governor of the first processor
    cpu_khz: str  # present clock of the first processor
    load_average: List[float]  # over 1, 5 and 15 minutes
    temperatures_c: Dict[str, float]  # thermal zone -> degrees Celsius
    board: str  # name of the board, from the device tree
    l4t: str  # release of Jetson Linux
    nvpmodel: str  # power mode of a Jetson
    gpu: str  # name, driver, power limit, clock and temperature, by nvidia-smi


def read_line(path: str) -> Optional[str]:
    """Return the text of a kernel file, or None if it is absent, unreadable or empty."""
    try:
        return Path(path).read_bytes().replace(b"\0", b"").decode("utf-8", "replace").strip() or None
    except OSError:
        return None


def cpu_model() -> str:
    """Return the name of the processor, or its architecture if the kernel has no name (ARM)."""
    for text in (read_line("/proc/cpuinfo") or "").splitlines():
        key, _, value = text.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_s() -> Optional[float]:
    """Return the processor time of all programs since the machine started, in s; None if the kernel does not report it."""
    fields = ((read_line("/proc/stat") or "").splitlines() or [""])[
        0
    ].split()  # cpu user nice system idle iowait irq softirq steal
    if len(fields) < 9 or fields[0] != "cpu" or not all(field.isdigit() for field in fields[1:9]):
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def ask(command: List[str]) -> Optional[str]:
    """Run a command that only reads, such as `nvidia-smi`. Return its output, or None if the command is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() or None if done.returncode == 0 else None


def device_state() -> DeviceState:
    """Return processor, clocks, load, temperatures and power mode of this machine. Values that cannot be read are left out."""
    cpufreq = "/sys/devices/system/cpu/cpu0/cpufreq/"
    temperatures = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        reading = read_line(str(zone / "temp"))
        if reading and reading.lstrip("-").isdigit():
            temperatures[read_line(str(zone / "type")) or zone.name] = int(reading) / 1000
    state = {
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "governor": read_line(cpufreq + "scaling_governor"),
        "cpu_khz": read_line(cpufreq + "scaling_cur_freq"),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "temperatures_c": temperatures or None,
        "board": read_line("/proc/device-tree/model"),
        "l4t": read_line("/etc/nv_tegra_release"),
        "nvpmodel": ask(["nvpmodel", "-q"]),
        "gpu": ask(
            [
                "nvidia-smi",
                "--query-gpu=name,driver_version,power.limit,clocks.sm,temperature.gpu",
                "--format=csv,noheader",
            ]
        ),
    }
    return cast(DeviceState, {key: value for key, value in state.items() if value is not None})
