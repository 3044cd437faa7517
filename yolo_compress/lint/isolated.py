"""A file of others is looked at in a process of its own, with limits on time and memory, and without a crash of ours.

onnx and protobuf are C++ and read what they are given: a file may take their memory, their time, or the process itself.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from yolo_compress import errors, exits
from yolo_compress.errors import CompressError, CorruptArtifact

SECONDS = 60  # YOLOv8x takes 3 s
MEMORY_MIB = 4096  # and 12 bytes for each of the file's; YOLOv8x, of 270 MB, takes 1.5 GB
COMPILER = ("tensorrt-rtx",)  # targets that a library builds: minutes, and addresses for a GPU's memory


def check_apart(file: Path, target: str) -> tuple[str, dict[str, Any]]:
    """`check.check` in a process of its own.

    Returns:
        The report as text and as JSON document.

    Raises:
        CompressError: As `check`.
        CorruptArtifact: Also a file that took more than SECONDS or the memory, or ended the process.
    """
    answer = _asked(file, target)
    return answer["text"], answer["document"]


def guard(file: Path) -> None:
    """Raises CorruptArtifact where an ONNX file is not one that a library of this process may be given."""
    _asked(file, "")


def _asked(file: Path, target: str) -> dict[str, Any]:
    limit = None if target in COMPILER else SECONDS
    words = [sys.executable, "-m", __name__, str(file), target]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, timeout=limit, env={**os.environ, **_path()})
    except subprocess.TimeoutExpired as error:
        raise CorruptArtifact(
            f"{file}: looking at it took more than {SECONDS} s; no detector does: do not use it"
        ) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CorruptArtifact(f"{file}: the ONNX library crashed over it ({name}); do not use it")
    if done.returncode:  # a bug, whose traceback is on stderr by now
        raise RuntimeError(f"{file}: the process that looked at it ended with {done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise getattr(errors, answer["error"], CompressError)(answer["message"])
    return dict(answer)


def _path() -> dict[str, str]:
    """This package is found wherever the child starts."""
    root = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def main(words: list[str]) -> int:
    """The child: `FILE TARGET`, one JSON document on stdout."""
    file, target = Path(words[0]), words[1]
    limit = (MEMORY_MIB << 20) + 12 * (file.stat().st_size if file.is_file() else 0)
    if target not in COMPILER:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        from yolo_compress.lint import check, load

        if target:
            report = check.check(file, target)
            answer: dict[str, Any] = {"text": report.text(), "document": report.as_json()}
        else:
            load.read(file)
            answer = {}
    except CompressError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except KeyboardInterrupt:
        return exits.SIGINT
    except MemoryError:
        text = f"{file}: looking at it took more than {limit >> 20} MiB; no detector does: do not use it"
        answer = {"error": CorruptArtifact.__name__, "message": text}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
