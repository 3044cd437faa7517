"""What `fetch` leaves, with archives of the form of those on the network; nothing is downloaded but from this process."""

from __future__ import annotations

import functools
import hashlib
import http.server
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from yolo_compress import home
from yolo_compress.cli import fetch
from yolo_compress.data.data_yaml import find_yaml, list_images, read_yaml
from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, RecipeError, StorageError
from yolo_compress.files import atomic

CONTENT = {
    "coco2017labels.zip": [
        "coco/labels/train2017/1.txt",
        "coco/labels/val2017/2.txt",
        "coco/train2017.txt",
        "coco/val2017.txt",
    ],
    "train2017.zip": ["train2017/1.jpg"],
    "val2017.zip": ["val2017/2.jpg"],
    "coco128.zip": ["coco128/images/train2017/1.jpg", "coco128/labels/train2017/1.txt"],
}


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, from the byte that is asked for; `asked` are the requests, `limit` bytes end an answer."""

    asked: list[tuple[str, str | None]]
    limit: int | None = None
    ranges = True


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path[1:], wanted))
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if start and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.server.limit])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for COCO, whatever this machine has: the files that are fetched here are small."""
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 40))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives in place of the network's; the working directory is empty."""
    shelf, user = tmp_path / "shelf", tmp_path / "user"
    shelf.mkdir(), user.mkdir()
    for name, files in CONTENT.items():
        with zipfile.ZipFile(shelf / name, "w") as archive:
            for file in files:
                split = Path(file).stem
                number = {"train2017": 1, "val2017": 2}.get(split)
                archive.writestr(file, f"./images/{split}/{number}.jpg\n" if number else "x")
    (shelf / "yolov8n.pt").write_bytes(bytes(range(256)) * 40_000)
    monkeypatch.chdir(user)
    for name in ("YOLO_COMPRESS_DATA", home.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return shelf


@pytest.fixture
def server(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(shelf))) as serving:
        serving.asked = []
        threading.Thread(target=serving.serve_forever, daemon=True).start()

        def local(source: fetch.Source) -> fetch.Source:
            file = shelf / source.name
            known = {"most": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            return replace(
                source,
                url=f"http://127.0.0.1:{serving.server_port}/{source.name}",
                holds=dict.fromkeys(source.holds, 1),
                **known if source.sha256 else {},
            )

        monkeypatch.setattr(fetch, "COCO", {name: tuple(map(local, sources)) for name, sources in fetch.COCO.items()})
        monkeypatch.setattr(fetch, "WEIGHTS", {"yolov8n.pt": local(fetch.WEIGHTS["yolov8n.pt"])})
        yield serving
        serving.shutdown()


@pytest.mark.parametrize("name", ["coco", "coco128"])
@pytest.mark.parametrize("folder", [None, "home"])
def test_a_fetched_set_is_what_the_shipped_yaml_reads(
    name: str, folder: str | None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder:
        monkeypatch.setenv(home.VARIABLE, folder)
    assert fetch.fetch(name) == Path(folder or ".") / "datasets" / name
    data = read_yaml(find_yaml(name))
    for split in ("train", "val"):
        listed, findings, _ = list_images(data, split)
        assert len(listed) == 1 and not findings and Path(listed[0].path).is_file()
    asked = len(server.asked)
    assert fetch.fetch(name) == home.datasets() / name and len(server.asked) == asked, "again: nothing is asked for"
    assert [path.name for path in Path().iterdir()] == [folder or "datasets"]
    assert sorted(path.name for path in home.datasets().iterdir()) == [".fetch.lock", name]


def test_weights_have_the_published_sha256_or_are_not_kept(server: Server, shelf: Path) -> None:
    assert fetch.fetch("yolov8n.pt").read_bytes() == (shelf / "yolov8n.pt").read_bytes()
    (home.weights() / "yolov8n.pt").unlink()
    content = bytearray((shelf / "yolov8n.pt").read_bytes())
    content[-1] ^= 1
    (shelf / "yolov8n.pt").write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"its sha256 is .*, published is .*; deleted"):
        fetch.fetch("yolov8n.pt")
    assert [path.name for path in home.weights().iterdir()] == [".fetch.lock"]


def test_a_file_that_is_there_is_kept_and_said_to_be_another(server: Server, capsys) -> None:
    home.weights().mkdir()
    (home.weights() / "yolov8n.pt").write_bytes(b"mine")
    assert fetch.fetch("yolov8n.pt").read_bytes() == b"mine" and not server.asked
    assert "exists and is used, but is not the file published today" in capsys.readouterr().err


def test_a_download_that_ends_early_is_continued(server: Server, shelf: Path) -> None:
    server.limit = 3 << 20
    for _ in range(2):
        with pytest.raises(EnvironmentLacks, match="cannot be fetched .*run the same command again, which continues"):
            fetch.fetch("yolov8n.pt")
        assert not (home.weights() / "yolov8n.pt").exists()
    server.limit = None
    assert fetch.fetch("yolov8n.pt").read_bytes() == (shelf / "yolov8n.pt").read_bytes()
    starts = [0 if wanted is None else int(wanted[6:-1]) for _, wanted in server.asked]
    assert starts[0] == 0 and 0 < starts[1] < starts[2]


def test_a_server_that_does_not_continue_is_asked_for_all(server: Server, shelf: Path) -> None:
    server.limit = 3 << 20
    with pytest.raises(EnvironmentLacks):
        fetch.fetch("yolov8n.pt")
    server.limit, server.ranges = None, False
    assert fetch.fetch("yolov8n.pt").read_bytes() == (shelf / "yolov8n.pt").read_bytes()


def test_a_whole_part_is_not_fetched_again(server: Server, shelf: Path) -> None:
    home.weights().mkdir()
    (home.weights() / ".fetch-yolov8n.pt.part").write_bytes((shelf / "yolov8n.pt").read_bytes())
    assert fetch.fetch("yolov8n.pt").is_file() and not server.asked


def test_a_half_unpacked_folder_is_completed(server: Server, shelf: Path) -> None:
    half = home.datasets() / "coco/images/train2017"
    half.mkdir(parents=True)
    (half / "mine.txt").write_text("a note")
    sources = fetch.COCO["coco"]
    train = replace(sources[1], holds={"coco/images/train2017": 2})
    fetch.COCO["coco"] = (sources[0], train, sources[2])
    assert not train.done()
    fetch.fetch("coco")
    assert sorted(path.name for path in half.iterdir()) == ["1.jpg", "mine.txt"]


def test_the_counts_are_those_of_coco() -> None:
    """What a folder holds decides whether it is done: a wrong number would fetch 19 GB anew with every call."""
    counts = {
        folder: count for sources in fetch.COCO.values() for one in sources for folder, count in one.holds.items()
    }
    assert counts == {
        "coco128/images/train2017": 128,
        "coco128/labels/train2017": 126,
        "coco/labels/train2017": 117_266,
        "coco/labels/val2017": 4_952,
        "coco/images/train2017": 118_287,
        "coco/images/val2017": 5_000,
    }
    assert all(one.sha256 for one in fetch.WEIGHTS.values()) and len(fetch.WEIGHTS) == 5


def link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("coco128/images/train2017/1.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (lambda archive: archive.writestr("../out.txt", "x"), "leads out of its folder"),
        (lambda archive: archive.writestr("/tmp/out.txt", "x"), "leads out of its folder"),
        (lambda archive: archive.writestr("a\\..\\..\\out.txt", "x"), "leads out of its folder"),
        (link, "is no plain file"),
        (lambda archive: archive.writestr("big.txt", bytes(200 << 20)), "bytes unpacked, expected"),
    ],
)
def test_an_archive_that_would_write_elsewhere_or_too_much_leaves_nothing(
    fill: Callable[[zipfile.ZipFile], None], says: str, server: Server, shelf: Path
) -> None:
    with zipfile.ZipFile(shelf / "coco128.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("coco128/labels/train2017/1.txt", "x")
        fill(archive)
    with pytest.raises(CorruptArtifact, match=says):
        fetch.fetch("coco128")
    assert [path.name for path in home.datasets().iterdir()] == [".fetch.lock"]
    assert not list(shelf.parent.rglob("out.txt"))


@pytest.mark.fault(21)
def test_a_damaged_archive_leaves_nothing(server: Server, shelf: Path) -> None:
    content = bytearray((shelf / "coco128.zip").read_bytes())
    content[content.index(b"1.jpg") + 5] ^= 1  # the file's one byte
    for damaged in (content, content[:-30], b"<html>"):
        (shelf / "coco128.zip").write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="the archive is incomplete or invalid"):
            fetch.fetch("coco128")
        assert [path.name for path in home.datasets().iterdir()] == [".fetch.lock"]


def test_an_archive_of_another_form_is_no_success(server: Server, shelf: Path) -> None:
    with zipfile.ZipFile(shelf / "coco128.zip", "w") as archive:
        archive.writestr("other/1.jpg", "x")
    with pytest.raises(EnvironmentLacks, match=r"coco128\.zip was fetched but datasets/coco128/.* is not whole"):
        fetch.fetch("coco128")


def test_more_than_is_published_is_not_fetched(server: Server, shelf: Path) -> None:
    with (shelf / "yolov8n.pt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptArtifact, match=r"10240004 bytes, expected 10240000 at most; not fetched"):
        fetch.fetch("yolov8n.pt")


@pytest.mark.fault(48)
def test_a_disk_without_room_is_said_first(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    with pytest.raises(StorageError, match=r"fetching yolov8n.pt needs 10 MiB .* make room first"):
        fetch.fetch("yolov8n.pt")


@pytest.mark.fault(60)
def test_no_network_says_where_to_put_the_file(server: Server, shelf: Path) -> None:
    (shelf / "yolov8n.pt").unlink()
    with pytest.raises(EnvironmentLacks, match=r"404.*put it at weights/yolov8n\.pt"):
        fetch.fetch("yolov8n.pt")


def test_another_name_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"fetch yolov9c\.pt: expected yolov8n\.pt to yolov8x\.pt, coco128, coco, digits or digits_many",
    ):
        fetch.fetch("yolov9c.pt")
