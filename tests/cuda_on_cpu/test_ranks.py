"""Several ranks on a CPU, with gloo instead of NCCL. Ranks keep equal weights, end together and take the decisions of rank 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.conftest import prepare
from tests.support.noise_set import noise_set
from tests.support.small_training import model, settings, small_set
from yolo_compress import exits, ranks
from yolo_compress.cli import processes
from yolo_compress.cli.main import main
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen
from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.train import trainer
from yolo_compress.train.trainer import HookedTrainer

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 60  # limit from the end of one rank to the end of the last


# --- without other processes ----------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_gpus_in_one_process_are_refused_and_the_work_folder_stays(tmp_path: Path) -> None:
    dataset, work = small_set(tmp_path / "set"), tmp_path / "work"
    work.mkdir()
    (work / "resume.pt").write_bytes(b"100 epochs of work")
    with pytest.raises(RecipeError, match=r"run\.device=0,1: one process trains on one GPU"):
        trainer.train(model(), dataset, settings(device="0,1"), [], work, "t")
    assert tree(work) == {"resume.pt": b"100 epochs of work"}


@pytest.mark.parametrize(
    ("words", "environment", "code", "line"),
    [
        (["run.device=0,1"], {}, 4, r"run.device=0,1: there is no GPU 0, 1, torch sees no GPU here"),
        (["run.device=cpu,0"], {}, 2, r"cpu,0"),
        ([], {"WORLD_SIZE": "2"}, 4, r"WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ([], {"WORLD_SIZE": "two"}, 4, r"WORLD_SIZE='two', expected a number"),
        ([], {"RANK": "1"}, 4, r"RANK=1 without WORLD_SIZE"),
    ],
)
def test_devices_and_environments_that_cannot_work_are_one_line(
    words: list[str], environment: dict[str, str], code: int, line: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["prune", "recipe=digits", *words]) == code
    finally:
        signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err
    assert line in error and len(error.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == [], "nothing was touched"


def test_a_verb_that_is_no_stage_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["status", "recipe=digits"]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == "error: status runs in one process; start it without torchrun\n"


def test_processes_and_gpus_have_to_be_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.check_devices("0,1", 2)
    with pytest.raises(EnvironmentLacks, match=r"no GPU 1, torch sees 1 GPU here"):
        ranks.check_devices("0,1", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks.check_devices("2,3", 4)
    assert ranks.own_device("2,3") == "3"
    with pytest.raises(RecipeError, match=r"the number of GPUs is 1, but torchrun started 2 processes"):
        ranks.check_devices("0", 2)


def test_a_batch_is_shared_evenly_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.check_batch("prune.batch", 7)
    monkeypatch.setenv("WORLD_SIZE", "3")
    ranks.check_batch("prune.batch", 9)
    with pytest.raises(RecipeError, match=r"prune\.batch=16: 3 processes share .* multiple of 3; the nearest is 15"):
        ranks.check_batch("prune.batch", 16)


def test_a_torchrun_of_one_process_is_no_distributed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ranks.check_environment()
    assert "RANK" not in os.environ and not ranks.several()


def test_hooks_travel_to_other_ranks_with_a_feature_loss_of_a_file(tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "def far(student_BCHW, teacher_BCHW, weight_B1HW):\n    return (student_BCHW - teacher_BCHW).abs().mean()\n"
    )
    hook = Teach(Frozen(model()), feature_weight=1.0, class_weight=0.0, feature_loss=f"{own}:far")
    torch.save(hook, tmp_path / "sent")
    received = torch.load(tmp_path / "sent", weights_only=False)
    maps = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3)
    assert float(received.feature.distance(*maps)) == 1.0
    assert received.weights == hook.weights


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # xdist pins a worker to one processor
def test_data_workers_draw_by_epoch_and_rank_and_a_resume_repeats_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_set(tmp_path / "set", train=4)

    def epochs(rank: int, start: int) -> list[str]:
        """Return the mean of each batch that the workers of a rank load, one text an epoch, for two epochs from `start`."""
        hooked = HookedTrainer(model(), dataset, settings(batch=2), [], tmp_path / "w", "t")
        hooked.stride, hooked.args.workers = 32, 2
        loader: Any = hooked.get_dataloader("train", 2)
        loader.sampler.rank, loader.sampler.next_epoch = rank, start
        try:
            return [repr([float(batch["img"].float().mean()) for batch in loader]) for _ in range(2)]
        finally:
            loader.close()
            hooked.close()

    first, second = epochs(0, 0)
    assert first != second, "epochs differ"
    assert epochs(0, 0) == [first, second], "a run repeats"
    assert epochs(0, 1)[0] == second, "a resume goes on with the epoch it is in"
    assert epochs(1, 0)[0] != first, "ranks differ"


# --- two ranks of one program ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run `rank_program` in two ranks. Return the records of each rank by training."""
    folder = tmp_path_factory.mktemp("ranks")
    noise_set(folder / "set", train=8, val=2)
    program = [str(Path(__file__).with_name("rank_program.py")), str(folder)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


TRAININGS = ["plain", "plain again", "overflow", "mgd", "mutual"]


@pytest.mark.slow
@pytest.mark.parametrize("what", TRAININGS)
def test_no_rank_drifts(what: str, seen: list[dict[str, Any]]) -> None:
    """All trainings use one process group. After each, weights, extras and averages of both ranks are equal bit for bit."""
    mine, other = (rank[what] for rank in seen)
    for key in ("steps", "parameters", "buffers", "extras", "ema"):
        assert mine[key] == other[key], key
    assert (len(mine["steps"]) > 0) == (what != "plain again")


@pytest.mark.slow
def test_ranks_share_the_images_of_an_epoch_and_draw_for_themselves(seen: list[dict[str, Any]]) -> None:
    mine, other = (rank["plain"] for rank in seen)
    for epoch in range(2):
        parts = [rank["images"][4 * epoch : 4 * (epoch + 1)] for rank in (mine, other)]
        assert sorted(parts[0] + parts[1]) == sorted(f"{number}.png" for number in range(8))
    assert not set(mine["drawn"]) & set(other["drawn"])


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_a_step_that_all_skip(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        scales = rank["overflow"]["scales"]
        assert scales[1] == scales[0] and rank["overflow"]["steps"][0] != rank["overflow"]["steps"][1]
        assert scales[0] == 2.0**15, "halved once from 65,536, on each rank"


# --- commands -------------------------------------------------------------------------------------------------------


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a command in two ranks on the CPU, through `launch` as `run.device=0,1` does."""
    code = "import sys; from yolo_compress.cli.main import explain, processes\n"
    code += "try: sys.exit(processes.launch(sys.argv[1:], 2))\nexcept BaseException as e:\n"
    code += "  if isinstance(e, SystemExit): raise\n  sys.exit(explain(e, True))"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *words], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def children(pid: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(entry.name)
        except OSError:
            continue


def rank_of(pid: int) -> int:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next((word[5:] for word in words if word.startswith(b"RANK=")), b"-1"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found through /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line_and_the_same_command_continues(
    victim: int, tmp_path: Path
) -> None:
    bench = prepare(tmp_path / "user", sparsify={"epochs": 3, "batch": 8, "lr0": 0.0005})
    command = ("sparsify", "recipe=tiny.yaml") if victim else ("prune", "recipe=tiny.yaml", "prune.rounds=2")
    process = start(bench.folder, *command)
    store = bench.folder / "weights" / "store"
    while process.poll() is None and not list(store.glob("sparsify-*.partial/work/resume.pt")):
        time.sleep(0.05)
    found = {rank_of(pid): pid for pid in children(process.pid)}
    os.kill(found[victim], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - killed < END_SECONDS
    assert process.returncode == 4
    lines = errors.splitlines()
    assert [line for line in lines if "error" in line.lower()] == [
        f"error: rank {victim} was killed by SIGKILL and the other ranks have ended; the same command continues"
    ]
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in found.values())
    if victim:
        return  # continuing does not depend on which rank was killed
    again = start(bench.folder, *command)
    answer, errors = again.communicate(timeout=250)
    assert again.returncode == 0, errors[-3000:]
    assert "sparsify: resuming at epoch" in errors
    assert len(answer.splitlines()) == 1 and json.loads(answer)["stage"] == command[0]


@pytest.mark.slow
def test_ranks_of_different_recipes_are_refused_in_one_line(tmp_path: Path) -> None:
    bench = prepare(tmp_path / "user")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes_ = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "yolo_compress", "sparsify", "recipe=tiny.yaml", f"sparsify.epochs={rank + 1}"],
            cwd=bench.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **shared, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes_]
    assert [process.returncode for process in processes_] == [2, 4]
    assert errors[0].splitlines() == [
        "error: rank 1 was started with another recipe than rank 0: give every machine the same command, recipe and versions"
    ]
    assert len(errors[1].splitlines()) == 1
    assert not (bench.folder / "weights" / "store").exists()


def test_the_rank_that_failed_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    class Failure:
        def __init__(self, exitcode: int) -> None:
            self.exitcode = exitcode

    lost = Failure(exits.LOST_RANK)
    assert processes._exit_code({0: lost, 1: Failure(7)}) == 7
    assert processes._exit_code({0: Failure(1)}) == 1, "the gate"
    assert processes._exit_code({0: Failure(-15), 1: Failure(4)}) == 4
    assert capsys.readouterr().err == "", "those ranks have printed their error"
    for failures, line in (
        ({0: lost, 1: Failure(-9)}, "rank 1 was killed by SIGKILL"),
        ({0: lost, 1: Failure(143)}, "rank 1 was killed by SIGTERM"),
        ({0: lost, 1: lost}, "the ranks lost the connection to each other"),
    ):
        assert processes._exit_code(failures) == 4
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and line in errors
