"""Several ranks on a CPU, with gloo instead of NCCL. Ranks keep equal weights, end together and take the decisions of rank 0."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from tests.pipeline.conftest import prepare
from tests.support.noise_set import noise_set
from tests.support.small_training import model, settings, small_set
from yolo_compress import exits, ranks
from yolo_compress.cli import processes
from yolo_compress.cli.main import main
from yolo_compress.distill.hook import Teach
from yolo_compress.distill.teacher import Frozen
from yolo_compress.errors import EnvironmentLacks, LostRank, RecipeError
from yolo_compress.store import environment
from yolo_compress.train import connection, together, trainer
from yolo_compress.train.trainer import HookedTrainer

pytestmark = pytest.mark.timeout(600)  # three processes on one core

ROOT = Path(__file__).resolve().parents[2]
TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
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


@pytest.mark.parametrize(
    "foreign", [{"RANK": "1"}, {"RANK": "one"}, {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": "1"}]
)
def test_variables_of_another_program_do_not_stop_a_verb_that_is_no_stage(
    foreign: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["version"]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == ""
    assert not foreign.keys() & os.environ.keys(), "Ultralytics reads them, too"


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


# --- ranks of one program -------------------------------------------------------------------------------------------


def run_program(folder: Path, ranks: int, device: str) -> list[dict[str, Any]]:
    """Run `rank_program`. Return the records of each rank by training."""
    noise_set(folder / "set", train=12, val=2)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(Path(__file__).with_name("rank_program.py")), str(folder), device],
        capture_output=True, text=True, timeout=580, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def two_gpus() -> int:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return 2


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three ranks on the CPU with gloo, two on GPUs with NCCL."""
    count, device = (3, "cpu") if request.param == "cpu" else (two_gpus(), "0,1")
    return run_program(tmp_path_factory.mktemp("ranks"), count, device)


TRAININGS = ["plain", "plain again", "overflow", "mgd", "mutual", "qat"]


@pytest.mark.slow
@pytest.mark.parametrize("what", TRAININGS)
def test_no_rank_drifts(what: str, seen: list[dict[str, Any]]) -> None:
    """All trainings use one process group. After each, weights, extras and averages of all ranks are equal bit for bit."""
    mine, *others = (rank[what] for rank in seen)
    for key in ("steps", "parameters", "buffers", "extras", "ema"):
        assert all(other[key] == mine[key] for other in others), key
    assert (len(mine["steps"]) > 0) == (what != "plain again")


@pytest.mark.slow
def test_ranks_share_the_images_of_an_epoch_and_draw_for_themselves(seen: list[dict[str, Any]]) -> None:
    plain = [rank["plain"] for rank in seen]
    share = 12 // len(plain)
    for epoch in range(2):
        images = [name for rank in plain for name in rank["images"][share * epoch : share * (epoch + 1)]]
        assert sorted(images) == sorted(f"{number}.png" for number in range(12))
    drawn = [number for rank in plain for number in rank["drawn"]]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_a_step_that_all_skip(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        scales = rank["overflow"]["scales"]
        assert scales[1] == scales[0] and rank["overflow"]["steps"][0] != rank["overflow"]["steps"][1]
        assert scales[0] == 2.0**15, "halved once from 65,536, on each rank"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            "nan",
            r"nan: harmed became NaN or infinite in epoch 1; .* The batch: \d+\.png, \d+\.png, listed in .*/bad_batch\.txt",
        ),
        ("drift", r"drift: after epoch 1: the weights of rank \d are not those of rank 0, .*"),
    ],
)
def test_what_goes_wrong_on_the_last_rank_is_the_error_of_rank_0(
    harm: str, message: str, seen: list[dict[str, Any]]
) -> None:
    """A NaN is found at its step, with the images of its rank."""
    first, *others = (rank[harm] for rank in seen)
    assert first[0] == "NumericsError" and re.fullmatch(message, first[1])
    assert others == [["LostRank", f"rank 0 ended: {first[1]}"]] * len(others)


# --- commands -------------------------------------------------------------------------------------------------------


def start(folder: Path, device: str, *words: str) -> subprocess.Popen[str]:
    """Start a command in two ranks through `launch`, as `run.device=0,1` does."""
    code = "import sys; from yolo_compress.cli.main import explain, processes\n"
    code += "try: sys.exit(processes.launch(sys.argv[1:], 2))\nexcept BaseException as e:\n"
    code += "  if isinstance(e, SystemExit): raise\n  sys.exit(explain(e, True))"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *words, f"run.device={device}"], cwd=folder, text=True,
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
@pytest.mark.parametrize("device", ["cpu", pytest.param("0,1", marks=pytest.mark.gpu)])
def test_a_killed_rank_ends_the_others_with_one_line_and_the_same_command_continues(
    device: str, tmp_path: Path
) -> None:
    if device != "cpu":
        two_gpus()
    bench = prepare(tmp_path / "user", sparsify={"epochs": 8, "batch": 8, "lr0": 0.0005})
    process, victim = start(bench.folder, device, "sparsify", "recipe=tiny.yaml"), random.randrange(2)
    store = bench.folder / "weights" / "store"
    while process.poll() is None and not list(store.glob("sparsify-*.partial/work/resume.pt")):
        time.sleep(0.05)
    time.sleep(random.random() / 2)  # a random step
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
    again = start(bench.folder, device, "sparsify", "recipe=tiny.yaml")
    answer, errors = again.communicate(timeout=250)
    assert again.returncode == 0, errors[-3000:]
    assert "sparsify: resuming at epoch" in errors
    assert len(answer.splitlines()) == 1 and json.loads(answer)["stage"] == "sparsify"


# Runs two ranks as on two machines, takes their network down once an epoch is saved, and prints how they ended.
CUT = """
import json, os, pathlib, random, subprocess, sys, time
QUICK = "import sys, yolo_compress.train.connection as c, yolo_compress.train.together as t; "
QUICK += "c.PROBE_S, c.LOSS_S, t.GRACE_S = 1, 4, 2; from yolo_compress.cli.main import main; sys.exit(main(sys.argv[1:]))"
shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
ranks = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", QUICK, *sys.argv[1:]], text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **shared, "RANK": str(rank)}) for rank in (0, 1)]
while ranks[0].poll() is None and not list(pathlib.Path("weights/store").glob("sparsify-*.partial/work/resume.pt")):
    time.sleep(0.05)
time.sleep(random.random())
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
start = time.monotonic()
errors = [rank.communicate(timeout=120)[1] for rank in ranks]
print(json.dumps({"seconds": time.monotonic() - start, "codes": [rank.returncode for rank in ranks], "errors": errors}))
"""


@pytest.mark.slow
def test_a_lost_network_ends_all_ranks_with_one_line_each(tmp_path: Path) -> None:
    """No packet says that the other machine is gone. Only the kernel's probes of the connection notice it."""
    apart = ["unshare", "--user", "--map-root-user", "--net"]
    if not shutil.which("ip") or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("a network of its own needs unshare and ip")
    bench = prepare(tmp_path / "user", sparsify={"epochs": 200, "batch": 8, "lr0": 0.0005})
    done = subprocess.run(
        [*apart, sys.executable, "-c", CUT, "sparsify", "recipe=tiny.yaml"], cwd=bench.folder, text=True,
        capture_output=True, timeout=280, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["codes"] == [4, 4] and found["seconds"] < END_SECONDS
    line = "the connection to another rank is lost: its process, machine or network stopped; the same command continues where it"
    for name, errors in zip(("", "rank 1: "), found["errors"], strict=True):
        assert [text for text in errors.splitlines() if "error" in text.lower()] == [f"error: {name}{line} stopped"]


def test_a_command_agrees_with_other_ranks_on_all_that_decides_its_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Recipe, stage, versions and kind of device; not `run.workers` and other settings of one machine."""
    agreed: list[dict[str, str]] = []

    def met(values: dict[str, str], number: int) -> Any:
        agreed.append(dict(values))
        raise LostRank("rank 0 ended before the training")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(connection, "connect", met)
    for name, value in {**TWO, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    changes: list[tuple[str, ...]] = [(), ("run.workers=2",), ("sparsify.epochs=9",), ("run.seed=1",)]
    try:
        assert [main(["sparsify", "recipe=digits", *words]) for words in changes] == [4] * 4
        assert main(["prune", "recipe=digits"]) == 4
        monkeypatch.setattr(environment, "version", lambda name: "0")
        assert main(["sparsify", "recipe=digits"]) == 4
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err == "error: rank 0 ended before the training\n" * 6
    usual, workers, epochs, seed, stage, versions = agreed
    assert usual.keys() == {"recipe", "stage", "version", "device"} and usual["device"] == "cpu"
    assert usual == workers
    assert [{name for name in usual if usual[name] != other[name]} for other in (epochs, seed, stage, versions)] == [
        {"recipe"}, {"recipe"}, {"stage"}, {"version"},
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.Store:
    """A store as rank 0 of two sees it, before rank 1 has come."""
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    store.set("agreed/0", json.dumps({"recipe": "a", "version": "1", "device": "cpu"}))
    return store


@pytest.mark.parametrize("name", ["recipe", "version", "device"])
def test_ranks_agree_on_recipe_versions_and_kind_of_device(name: str, rank_0: torch.distributed.Store) -> None:
    rank_0.set("agreed/1", json.dumps({"recipe": "a", "version": "1", "device": "cpu", name: "other"}))
    with pytest.raises(RecipeError, match=f"rank 1 was started with another {name} than rank 0: give every machine"):
        connection._accept(rank_0)


def test_a_rank_that_never_starts_is_named(rank_0: torch.distributed.Store) -> None:
    with pytest.raises(
        EnvironmentLacks, match=r"^rank 1 did not start within 5 minutes: look at the output of its machine$"
    ):
        connection._accept(rank_0)


def test_a_stranger_is_no_rank_and_a_message_arrives_whole(
    rank_0: torch.distributed.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_0.set("agreed/1", rank_0.get("agreed/0"))
    with ThreadPoolExecutor() as pool:
        accepted = pool.submit(connection._accept, rank_0)
        rank_0.wait(["address"], timedelta(seconds=20))
        port, token = json.loads(rank_0.get("address"))
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + b" " * 10)
        strangers[1].close()
        other = socket.create_connection(("127.0.0.1", port))
        other.sendall(connection.HELLO.pack(token.encode(), 1))
        (one,) = accepted.result(20)
        content = os.urandom(3 << 20)
        received = pool.submit(connection.receive, other)
        connection.send(one, content)
        assert received.result(20) == content
        lost = threading.Event()
        with connection.watched([one], lost.set):
            assert not lost.wait(0.2)
            other.close()
            assert lost.wait(20)
        with pytest.raises(LostRank, match="the connection to another rank is lost"):
            connection.send(one, b"")
        strangers[0].close()
        one.close()


def test_values_of_many_types_travel_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broadcast and average with a world of one process, in which the sum is the value of this rank."""
    sent = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor.clone()) or tensor.zero_()
    )
    tensors = [
        torch.tensor(True),
        torch.arange(3),
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.rand(()),
    ]
    together.broadcast(tensors)
    assert len(sent) == 1 and len(sent[0]) == 1 + 24 + 480 + 4
    assert not any(bool(tensor.any()) for tensor in tensors)
    assert torch.equal(sent[0][1:25].clone().view(torch.int64), torch.arange(3))

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sent.append(tensor) or tensor.mul_(2))
    monkeypatch.setattr(together, "BUCKET", 10)
    sent.clear()
    parameters = [torch.nn.Parameter(torch.rand(size)) for size in (4, 6, 5, 20)]
    expected = [None if index == 2 else torch.rand_like(p) for index, p in enumerate(parameters)]
    for parameter, gradient in zip(parameters, expected, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    together.average_gradients(parameters)
    assert [len(bucket) for bucket in sent] == [2 + 10, 1 + 5, 1 + 20]
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_a_launcher_that_cannot_listen_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any, entry: str) -> Any:
        raise RendezvousConnectionError("The connection to the C10d store has failed. See inner exception for details.")

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", refuse)
    with pytest.raises(EnvironmentLacks, match=r"^cannot start the ranks: The connection to the C10d store has failed"):
        processes.launch(["prune"], 2)


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
