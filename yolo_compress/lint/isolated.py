"""Check an untrusted ONNX file in a child process with limits on time and memory.

onnx and protobuf are C++ libraries. A malicious file can exhaust memory or time, or crash the process that reads it.
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
MEMORY_MIB = 4096  # plus 12 bytes per byte of the file; YOLOv8x, of 270 MB, takes 1.5 GB
COMPILER = ("tensorrt-rtx",)  # no limits for these targets: a build takes minutes and reserves addresses for GPU memory


def check_isolated(file: Path, target: str) -> tuple[str, dict[str, Any]]:
    """Run `check.check` in a child process with limits on time and memory.

    Returns:
        The report as text and as a JSON document.

    Raises:
        CorruptArtifact: The file is damaged. Or the child process exceeded its time or memory limit, or crashed.
        CompressError: Another error of `check.check`.
    """
    answer = _run_child(file, target)
    return answer["text"], answer["document"]


def guard(file: Path) -> None:
    """Raise CorruptArtifact if an ONNX file is not safe to load in this process."""
    _run_child(file, "")


def _run_child(file: Path, target: str) -> dict[str, Any]:
    limit = None if target in COMPILER else SECONDS
    words = [sys.executable, "-m", __name__, str(file), target]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, timeout=limit, env={**os.environ, **_import_path()})
    except subprocess.TimeoutExpired as error:
        raise CorruptArtifact(
            f"{file}: the check took more than {SECONDS} s, which no detector needs; do not use the file"
        ) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise CorruptArtifact(f"{file}: the ONNX library crashed while reading it ({name}); do not use the file")
    if done.returncode:  # a bug; the child has written its traceback to stderr
        raise RuntimeError(f"{file}: the process that checked it ended with exit code {done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise getattr(errors, answer["error"], CompressError)(answer["message"])
    return dict(answer)


def _import_path() -> dict[str, str]:
    """Return a PYTHONPATH with which the child imports this package from any folder."""
    root = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def main(words: list[str]) -> int:
    """Check one file in the child process and print the answer as JSON on stdout.

    Args:
        words: Path of the file, and name of the target; with an empty name the file is only read.
    """
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
        text = f"{file}: the check took more than {limit >> 20} MiB, which no detector needs; do not use the file"
        answer = {"error": CorruptArtifact.__name__, "message": text}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
