"""`yolo-compress fetch`: download official weights and COCO, or draw the digits. No other verb uses the network.

A download is checked by its size. If the sha256 is published, that is checked too. The file has a temporary name until the
download is complete, and the next call continues an interrupted download. An archive is unpacked into a temporary folder beside
its final place.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from yolo_compress import home, progress
from yolo_compress.cli.grammar import Command
from yolo_compress.data.shipped import SCENES, draw_digits
from yolo_compress.errors import CorruptArtifact, EnvironmentLacks, RecipeError
from yolo_compress.files.atomic import fsync_file, replace, require_free, storage_errors
from yolo_compress.files.lock import lock
from yolo_compress.runtime.files import sha256_file

ASSETS = "https://github.com/ultralytics/assets/releases/download"
MIB = 1 << 20
READ = MIB  # bytes at a time
WAIT_SECONDS = (30, 60)  # for a connection, and for the next bytes


@dataclass(frozen=True)
class Source:
    """A file or archive on the network.

    Attributes:
        url: Address of the file.
        most: Size of the download in bytes, or an upper limit if the size is not published.
        sha256: The published SHA-256. None: it is not published, and only the archive's own checksums are checked.
        into: Folder below `home.datasets()` that the archive is unpacked into. None: the download is one file, for
            `home.weights()`.
        holds: Folder below `home.datasets()` -> number of files in it once the archive is unpacked.
        unpacked: Upper limit of the unpacked size in bytes.
    """

    url: str
    most: int
    sha256: str | None = None
    into: str | None = None
    holds: Mapping[str, int] = field(default_factory=dict)
    unpacked: int = 0

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def place(self) -> Path:
        """Path of the file or folder once the download is complete."""
        if self.into is None:
            return home.weights() / self.name
        return home.datasets() / next(iter(self.holds))

    def done(self) -> bool:
        """Whether the file, or the unpacked archive, is complete. A killed call leaves a folder with fewer files."""
        if self.into is None:
            return self.place.exists()
        return all(_files(home.datasets() / folder) >= count for folder, count in self.holds.items())


def _weights(name: str, size: int, sha256: str) -> Source:
    return Source(f"{ASSETS}/v8.4.0/{name}", size, sha256)


WEIGHTS = {  # the size of n is published, the other sizes are upper limits; the digests are those that GitHub shows
    source.name: source
    for source in (
        _weights("yolov8n.pt", 6_549_796, "f59b3d833e2ff32e194b5bb8e08d211dc7c5bdf144b90d2c8412c47ccfc83b36"),
        _weights("yolov8s.pt", 30 * MIB, "1f47a78bf100391c2a140b7ac73a1caae18c32779be7d310658112f7ac9aa78a"),
        _weights("yolov8m.pt", 70 * MIB, "5d4a90cdc7a21786cc59cd19778e9eafff836df9e2da32524737c7ee6efe4fe5"),
        _weights("yolov8l.pt", 110 * MIB, "64c9115303f6a25575f82200d1b22ec409fa6bd7d08d0313884fc20d919478cd"),
        _weights("yolov8x.pt", 170 * MIB, "3df4ada6b4dad6d657868f2fdf7faecfb34dcfccf3a25c4b82079064718524c8"),
    )
}
COCO = {
    "coco128": (
        Source(
            f"{ASSETS}/v0.0.0/coco128.zip",
            20 * MIB,
            into=".",
            holds={"coco128/images/train2017": 128, "coco128/labels/train2017": 126},
            unpacked=100 * MIB,
        ),
    ),
    "coco": (
        Source(
            f"{ASSETS}/v0.0.0/coco2017labels.zip",
            200 * MIB,
            into=".",
            holds={"coco/labels/train2017": 117_266, "coco/labels/val2017": 4_952},
            unpacked=1024 * MIB,
        ),
        Source(
            "http://images.cocodataset.org/zips/train2017.zip",  # the host has no certificate of its own
            19_336_861_798,
            "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            "coco/images",
            {"coco/images/train2017": 118_287},
            21 * 1024 * MIB,
        ),
        Source(
            "http://images.cocodataset.org/zips/val2017.zip",
            815_585_330,
            "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            "coco/images",
            {"coco/images/val2017": 5_000},
            1024 * MIB,
        ),
    ),
}
MAX_MEMBERS = 300_000  # of an archive


def handle(command: Command) -> int:
    """Download each file or data set that the command line names, and print its path."""
    for name in command.words:
        progress.result(str(fetch(name)))
    return 0


def fetch(name: str) -> Path:
    """Download `yolov8{n,s,m,l,x}.pt`, `coco128` or `coco`, or draw `digits` or `digits_many` without the network. Return the path.

    Raises:
        RecipeError: `name` is none of these.
        EnvironmentLacks: There is no network. The message says where to put the file.
        CorruptArtifact: The download is not the published file, or not a valid archive. It is deleted.
        StorageError: The disk is full or cannot be written. The next call continues the download.
    """
    if name in SCENES:
        return draw_digits(name)
    if name in WEIGHTS:
        _fetch(WEIGHTS[name], home.weights())
        return home.weights() / name
    if name in COCO:
        for source in COCO[name]:
            _fetch(source, home.datasets())
        return home.datasets() / name
    raise RecipeError(f"fetch {name}: expected yolov8n.pt to yolov8x.pt, coco128, coco, digits or digits_many")


def _fetch(source: Source, folder: Path) -> None:
    if source.done():
        _say_other(source)
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".fetch.lock", f"fetch {source.name}"), storage_errors(folder):
        if source.done():
            return
        part = folder / f".fetch-{source.name}.part"
        _download(source, part)
        if source.into is None:
            replace(part, source.place)
            return
        beside = folder / f".fetch-{source.name}.unpacked"
        shutil.rmtree(beside, ignore_errors=True)
        _unpack(source, part, beside)
        _merge(beside, folder / source.into)
        shutil.rmtree(beside)
        part.unlink()
        if not source.done():
            raise EnvironmentLacks(f"{source.url} was fetched but {source.place} is not whole; unpack it by hand")


def _say_other(source: Source) -> None:
    """Print a notice if the existing file differs from the published file. It may be an earlier release, or the user's own file."""
    if source.sha256 and source.into is None and (found := sha256_file(source.place)) != source.sha256:
        progress.notice(
            f"{source.place} exists and is used, but is not the file published today (sha256 {found[:12]}..., expected "
            f"{source.sha256[:12]}...); move it away to fetch that"
        )


def _files(folder: Path) -> int:
    try:
        return sum(1 for _ in os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _download(source: Source, part: Path) -> None:
    """Download the whole file as `part`, and check its size and sha256."""
    have = part.stat().st_size if part.is_file() else 0
    if have < source.most or not source.sha256:
        with _explained(source):
            _receive(source, part, have)
    fsync_file(part)
    if source.sha256 and (found := sha256_file(part)) != source.sha256:
        part.unlink()
        raise CorruptArtifact(
            f"{source.url}: its sha256 is {found}, published is {source.sha256}; deleted. Run the same command again. If "
            "it fails again, the file was changed on its way or by its publisher"
        )


def _receive(source: Source, part: Path, have: int) -> None:
    """Download the bytes after the first `have`, and append them to `part`. If the server cannot do that, download the whole file."""
    import requests

    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(source.url, stream=True, headers=headers, timeout=WAIT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable and have:
            return  # no bytes are missing; `_download` then checks the size and sha256
        response.raise_for_status()
        have = have if response.status_code == requests.codes.partial_content else 0
        total = have + int(response.headers.get("Content-Length") or 0)
        if total > source.most:
            raise CorruptArtifact(f"{source.url}: {total} bytes, expected {source.most} at most; not fetched")
        require_free(part.parent, (total - have + source.unpacked) / MIB, f"fetching {source.name}")
        with (
            open(part, "ab" if have else "wb") as file,
            progress.bar(f"fetch {source.name}", total // MIB, "MiB", have // MIB) as advance,
        ):
            for data in response.iter_content(READ):
                have += len(data)
                if have > source.most:
                    raise CorruptArtifact(f"{source.url}: more than {source.most} bytes; stopped")
                file.write(data)
                advance(len(data) // MIB)
        if have < total:
            raise ConnectionError(f"ended after {have} of {total} bytes")


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn network errors inside the block into an error with a one-line message. Disk errors are raised unchanged."""
    import requests

    try:
        yield
    except (requests.RequestException, ConnectionError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise EnvironmentLacks(
            f"{source.url} cannot be fetched ({type(error).__name__}: {first}); run the same command again, which continues, "
            f"or download it on another machine and put it at {source.place}"
        ) from error


def _unpack(source: Source, archive: Path, into: Path) -> None:
    """Unpack an archive into the folder `into`, and check the checksum of each file.

    `_check` first refuses archives with files outside the folder, or with more bytes than expected.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _check(source, members)
            with progress.bar(f"unpack {source.name}", len(members), "files") as advance:
                for member in members:
                    target = into / member.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(member) as read, open(target, "xb") as written:
                        shutil.copyfileobj(read, written, READ)
                    advance()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        shutil.rmtree(into, ignore_errors=True)
        archive.unlink()
        raise CorruptArtifact(
            f"{source.url}: the archive is incomplete or invalid ({error}); deleted, run the same command again"
        ) from error
    except BaseException:
        shutil.rmtree(into, ignore_errors=True)
        raise
    os.sync()  # one sync for all: a sync for each of 118,000 files takes minutes


def _check(source: Source, members: list[Any]) -> None:
    """Raise ValueError if the archive would write outside its folder, or more bytes than expected."""
    names = [member.filename for member in members]
    if len(members) > MAX_MEMBERS or len(set(names)) < len(names):
        raise ValueError(f"{len(names)} files, expected {MAX_MEMBERS} at most, each once")
    if (size := sum(member.file_size for member in members)) > source.unpacked:
        raise ValueError(f"{size} bytes unpacked, expected {source.unpacked} at most")
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or "\0" in member.filename:
            raise ValueError(f"{member.filename!r} leads out of its folder")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise ValueError(f"{member.filename!r} is no plain file")


def _merge(source: Path, target: Path) -> None:
    """Move the contents of the folder `source` into the folder `target`, which may have other files.

    If `target` has no entry of the same name, a file or folder is moved by one rename.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
        else:
            os.replace(entry, place)
