"""Find and read data yamls, and list the image files of each split.

This package does not let Ultralytics read the data yaml, for two reasons. If images are missing, Ultralytics runs the text under
`download:`, which is ignored here. And Ultralytics reads the entries of image lists relative to the working directory.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

from yolo_compress import home
from yolo_compress.data import shipped as datasets
from yolo_compress.errors import DataError, RecipeError
from yolo_compress.files import strict_yaml

# Suffixes that Ultralytics 8.4.190 reads as images, and suffixes of other images, which it ignores without a message.
IMAGE_SUFFIXES = frozenset(
    ("avif", "bmp", "dng", "heic", "heif", "jp2", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp")
)
UNREAD_SUFFIXES = frozenset(("gif", "pbm", "pgm", "ppm", "tga", "exr", "hdr", "ico", "psd"))
COMPANIONS = frozenset(  # suffixes of other files that are usual in folders of images
    ("cache", "csv", "db", "html", "ini", "json", "md", "npy", "npz", "pdf", "py", "txt", "xml", "yaml", "yml", "zip")
)
MAX_CLASSES = 20_000  # limit of strict_yaml; the largest detection data set has 1,203 classes
MAX_KEYPOINTS = 10_000
MAX_FOLDERS = 100_000  # in one split
NEWLINE = b"\n"
UNPRINTED = frozenset(("Cc", "Cs", "Zl", "Zp"))  # Unicode's control characters, surrogates and line breaks


_MakeError = Callable[[str, str], DataError]  # (key, message) -> error with file and line


@dataclass(frozen=True)
class DataYaml:
    """Checked content of a data yaml. `train` and `val` have the entries of the file, unchanged. `root` is absolute."""

    file: Path
    root: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    names: tuple[str, ...]
    channels: int
    lines: dict[str, str]  # "file:line" of `train` and `val`
    pose_columns: int  # keypoint columns after each box of a pose data set; they are ignored, as in Ultralytics


class Listed(NamedTuple):
    """An image file of a split. `name`: path relative to the data root, with slashes. `source`: "list.txt:3" or a folder."""

    path: str
    name: str
    source: str


def shown(path: Path | str) -> str:
    """Return `path` for messages: relative if it is below the working directory, else unchanged."""
    return strict_yaml.shown(_relative(path))


def _relative(path: Path | str) -> str:
    return str(path).removeprefix(os.getcwd() + os.sep)


def left_out(names: Iterable[str]) -> str | None:
    """Return one line of text with the number of files that are not images. None: there are none.

    Hidden files are not counted. Labels, lists, caches and other files that are usual beside images are not counted either.
    """
    suffixes = [Path(name).suffix.lower() for name in names if not name.startswith(".")]
    counts = Counter(suffix for suffix in suffixes if suffix[1:] not in COMPANIONS)
    if not counts:
        return None
    listed = ", ".join(f"{shown(suffix) or 'no suffix'} {count}" for suffix, count in counts.most_common(5))
    return f"{sum(counts.values())} files left out, because they have no image suffix ({listed})"


def data_folders() -> list[Path]:
    """Return the folders to search for data sets: `home.datasets()`, then the folders of YOLO_COMPRESS_DATA."""
    extra = os.environ.get("YOLO_COMPRESS_DATA", "").split(os.pathsep)
    return [home.datasets(), *(Path(folder) for folder in extra if folder)]


def find_yaml(name: str) -> Path:
    """Return the path of a data yaml. `name` is a path, a name in `data_folders()`, or a data yaml of this package.

    The suffix .yaml is optional.

    Raises:
        RecipeError: There is no such file. The message lists the folders searched and the yamls in them.
    """
    if not name or "\0" in name:
        raise RecipeError(f"data={name!r} is not the name of a data yaml")
    folders = [*data_folders(), datasets.FOLDER]
    tried = [Path(name), *(folder / name for folder in folders)]
    for path in tried:
        for candidate in (path, path.with_name(path.name + ".yaml")) if path.name else ():
            try:
                if candidate.is_file():
                    return candidate.absolute()
            except OSError as e:
                raise RecipeError(f"data yaml {name!r}: {e.strerror}") from e
    if Path(name).is_dir():
        raise RecipeError(f"data yaml {name!r} is a folder; give the .yaml file in it")
    known = sorted({y.name for folder in folders if folder.is_dir() for y in folder.glob("*.yaml")})
    raise RecipeError(
        f"no data yaml {name!r} here or in {', '.join(map(str, folders))}; available: {', '.join(known)}; "
        "give its path, or set YOLO_COMPRESS_DATA to its folder"
    )


def read_yaml(file: Path) -> DataYaml:
    """Read and check the data yaml `file`.

    Raises:
        DataError: The encoding, syntax or a value is wrong, a key is repeated, or there is a Python tag or alias. The
            message starts with "file:line:".
    """
    document = strict_yaml.load(_relative(file), DataError)
    values = document.data

    def bad(key: str, what: str) -> DataError:
        return DataError(f"{document.where((key,))}: {what}")

    names = _names(values, bad)
    channels = values.get("channels", 3)
    if channels not in (1, 3) or isinstance(channels, bool):
        raise bad("channels", f"channels must be 1 or 3, not {channels!r}")
    root = _root(file, values, bad)
    splits = {}
    for key in ("train", "val"):
        entry = values.get(key, values.get("validation") if key == "val" else None)
        entries = entry if isinstance(entry, list) else [entry]
        checked = [_checked_entry(root, e, partial(bad, key)) for e in entries if isinstance(e, str) and e.strip()]
        if not checked or len(checked) < len(entries):
            raise bad(key, f"{key}: must be a folder, a .txt list or a list of these, not {entry!r}")
        splits[key] = tuple(checked)
    pose = values.get("kpt_shape") or [0, 0]
    if not (
        isinstance(pose, list) and len(pose) == 2 and all(type(n) is int and 0 <= n <= MAX_KEYPOINTS for n in pose)
    ):
        raise bad("kpt_shape", f"kpt_shape must be two numbers from 0 to {MAX_KEYPOINTS}, not {pose!r}")
    lines = {key: document.where((key,)) for key in splits}
    return DataYaml(file, root, splits["train"], splits["val"], names, channels, lines, pose[0] * pose[1])


def _names(values: Mapping[str, object], bad: _MakeError) -> tuple[str, ...]:
    names, count = values.get("names"), values.get("nc")
    if count is not None and not (type(count) is int and 1 <= count <= MAX_CLASSES):
        raise bad("nc", f"nc must be a whole number from 1 to {MAX_CLASSES}, not {count!r}")
    if names is None:
        if count is None:
            raise bad("names", "names: is missing; list the class names")
        return tuple(f"class_{i}" for i in range(count))
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise bad("names", f"names: must number the classes from 0 to {len(names) - 1} without gaps")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise bad("names", f"names: must list the classes, not {names!r}")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
            raise bad("names", f"class name {name!r} is not text; put it in quotes")
        if any(unicodedata.category(char) in UNPRINTED for char in str(name)):
            what = "contains a line break or another control character; labels.txt and the tables have one line a class"
            raise bad("names", f"class name {name!r} {what}")
    texts = tuple(str(name) for name in names)
    if len(set(texts)) < len(texts):
        raise bad("names", f"class name {next(t for t in texts if texts.count(t) > 1)!r} is given twice")
    if count is not None and count != len(texts):
        raise bad("nc", f"nc is {count} but names: lists {len(texts)}")
    return texts


def _root(file: Path, values: Mapping[str, object], bad: _MakeError) -> Path:
    """Return the data root: the folder under `path:`, relative to the yaml, or else relative to one of `data_folders()`.

    `data_folders()` is for yamls of Ultralytics, which has all data sets in one folder. For a yaml of this package, `path:` is
    searched only in `data_folders()`, never in the folder of the code.
    """
    text = values.get("path")
    if text is not None and (not isinstance(text, str) or "\0" in text):
        raise bad("path", f"path: must be a folder, not {text!r}")
    shipped = file.parent == datasets.FOLDER
    folders = data_folders() if shipped else [file.parent, *data_folders()]
    for folder in folders:
        path = folder / (text or ".")
        if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
            return path.resolve()
    hint = f"; run `yolo-compress fetch {file.stem}`" if shipped else ""
    raise bad("path", f"path: {text} is not a folder; searched in {', '.join(map(shown, folders))}{hint}")


def _checked_entry(root: Path, entry: str, bad: Callable[[str], DataError]) -> str:
    """Return the entry of a split, checked. Exports of Roboflow wrongly have `../train` for `./train`. This is corrected.

    Raises:
        DataError: `..` leads out of `root`.
    """
    if os.path.isabs(entry) or not _escapes(root, root, entry):
        return entry
    if entry.startswith("../") and not os.path.exists(root / entry) and not _escapes(root, root, entry[3:]):
        return entry[3:]
    raise bad(f"{entry} leads out of {shown(root)}; set path: to the folder with all splits")


def _escapes(root: Path, folder: Path, entry: str) -> bool:
    """Return whether `..` in an entry leads from `folder` out of `root`."""
    full = os.path.normpath(folder / entry)
    return ".." in Path(entry).parts and full != str(root) and not full.startswith(str(root) + os.sep)


class Listing(NamedTuple):
    """Image files of a split, sorted by path, with findings about folders and lists. A note says which other files were left out."""

    images: list[Listed]
    findings: list[str]
    notes: list[str]


def list_images(data: DataYaml, split: Literal["train", "val"]) -> Listing:
    """List the image files of a split.

    Folders are searched with all subfolders and symbolic links. Hidden files and folders and files that are not images
    are left out, as in Ultralytics. A relative entry in a list file is relative to the folder of the list file. Ultralytics
    does that only for entries with `./`. It reads other entries relative to the working directory.

    Raises:
        DataError: A folder or list of the data yaml does not exist, or an entry of a list leads out of the data root.
    """
    images: list[Listed] = []
    findings: list[str] = []
    others: list[str] = []
    for entry in data.train if split == "train" else data.val:
        # Links are not resolved: labels are next to the link, not next to its target.
        path = Path(os.path.normpath(data.root / entry))
        if os.path.isdir(path):
            items: Iterator[Listed | str] = _folder(data.root, path, others)
        elif os.path.isfile(path):
            items = _list_file(data.root, path)
        else:
            raise DataError(f"{data.lines[split]}: {split}: {shown(data.root / entry)} does not exist")
        for item in items:
            if isinstance(item, str):
                findings.append(item)
            else:
                images.append(item)
    note = left_out(others)
    images.sort(key=attrgetter("path"))
    return Listing(images, findings, [f"{split}: {note}"] if note else [])


def _relative_name(root: Path, path: str) -> str:
    """Return a path relative to the data root, with slashes. A path outside the root is returned whole."""
    return path.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def _folder(root: Path, top: Path, others: list[str]) -> Iterator[Listed | str]:
    """Yield the images in the folder `top` and its subfolders, and findings as text. Append names of other files to `others`."""

    def fail(error: OSError) -> None:
        failed.append(f"{shown(error.filename)}: {error.strerror}")

    failed: list[str] = []
    source = shown(top)
    for number, (folder, folders, files) in enumerate(os.walk(top, followlinks=True, onerror=fail)):
        if number >= MAX_FOLDERS:
            raise DataError(
                f"{shown(top)}: more than {MAX_FOLDERS} folders, with symbolic links; give the folder with the images"
            )
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            path = os.path.join(folder, name)
            if os.path.islink(path) and _leads_back(path, folder, top):
                yield f"{shown(path)}: symbolic link to one of its parent folders"
                folders.remove(name)
        prefix = os.path.join(folder, "")
        within = _relative_name(root, prefix)
        for name in files:
            suffix = name.rpartition(".")[-1].lower() if "." in name else ""
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                yield Listed(prefix + name, within + name, source)
            elif suffix in UNREAD_SUFFIXES:
                yield f"{shown(os.path.join(folder, name))}: .{suffix} images are not supported"
            else:
                others.append(name)
    yield from failed


def _leads_back(link: str, folder: str, top: Path) -> bool:
    """Return whether the folder link `link` leads back to a folder that contains it, at or below `top`.

    The link may lead there through other links.
    """
    parents = [Path(folder)]
    while parents[-1] != top:
        parents.append(parents[-1].parent)
    try:
        return any(os.path.samefile(link, parent) for parent in parents) or (folder + os.sep).startswith(
            os.path.realpath(link) + os.sep
        )
    except OSError:  # links that lead only to each other
        return True


def _list_file(root: Path, file: Path) -> Iterator[Listed | str]:
    """Yield the images of a list file, and findings as text."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as e:
        yield f"{shown(file)}: {e.strerror}"
        return
    except UnicodeDecodeError as e:
        yield f"{shown(file)}:{data.count(NEWLINE, 0, e.start) + 1}: not UTF-8 text (byte {data[e.start]:#04x})"
        return
    for number, line in enumerate(text.splitlines(), 1):
        entry, source = line.strip(), f"{shown(file)}:{number}"
        if not entry:
            continue
        if "\0" in entry or entry.rpartition(".")[-1].lower() not in IMAGE_SUFFIXES:
            yield f"{source}: {entry[:80]!r} is not an image of a supported format"
        elif not os.path.isabs(entry) and _escapes(root, file.parent, entry):
            raise DataError(f"{source}: {entry} leads out of {shown(root)}")
        else:
            path = os.path.normpath(file.parent / entry)
            yield Listed(path, _relative_name(root, path), source)
