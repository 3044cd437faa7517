"""Time `search status`, `search report` and the hand-out of a trial in a study of finished toy trials.

    python benchmarks/search_status.py [--trials 1000]

The trials take no time and train nothing. Points come from Optuna. The bar is 5 s for `status` and for `report`. `cpu_s` is their
processor time, which other programs disturb less than `seconds`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support import toy_study as toy  # noqa: E402
from yolo_compress.search.sampler import OptunaSampler  # noqa: E402
from yolo_compress.search.study import write_figures  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ["YOLO_COMPRESS_HOME"] = name
        study = toy.study(home, "toy", ("search.trials", str(trials)))
        toy.measure_reference(study)
        sampler = OptunaSampler(study.folder, "toy", study.space, study.own, seed=0, trials=trials, storage=None)
        sampler.claim(study.file["id"])
        started, last = time.monotonic(), 0.0
        for _ in range(trials):
            before = time.monotonic()
            with study.given_out(sampler, trials) as trial:
                assert trial is not None
                last = time.monotonic() - before
                found = toy.engine(trial.number, float(trial.point["keep_flops"]))
                levels = ("cut", "short", "full")
                write_figures(
                    trial.folder,
                    {
                        one: {
                            "retention": found["retention"],
                            "low": found["low"],
                            "high": found["high"],
                            "cost": found["cost"],
                        }
                        for one in levels
                    },
                )
                study.finish(
                    trial, {"state": "done", "after": "int8", "why": None, "engines": [found], "seconds": 1.0}, sampler
                )
        seconds = {"all trials given out and finished": time.monotonic() - started, "the last one given out": last}
        cpu_s = {}
        for verb in ("status", "report"):
            before, used = time.monotonic(), used_s()
            command = [sys.executable, "-m", "yolo_compress", "search", verb, "study=toy"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
            seconds[verb], cpu_s[verb] = time.monotonic() - before, used_s() - used
        print(json.dumps({"trials": trials, "seconds": rounded(seconds), "cpu_s": rounded(cpu_s)}))


def used_s() -> float:
    """Return the processor time of all child processes that have ended, in s."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in seconds.items()}


if __name__ == "__main__":
    main()
