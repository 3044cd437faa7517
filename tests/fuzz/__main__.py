"""`python -m tests.fuzz [CASES [SEED [DOOR ...]]]`: a table of all doors; exit code 1 where a case failed. `make fuzz` calls it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from yolo_compress.nets.hardening import harden

harden()

from tests.fuzz.doors import DOORS  # noqa: E402
from tests.fuzz.run import CASES, run  # noqa: E402


def main(words: list[str]) -> int:
    total, seed = [*map(int, words[:2]), *(CASES, 0)[len(words) :]]
    chosen = [door for door in DOORS if not words[2:] or door.name.replace(" ", "_") in words[2:]]
    print(f"{'door':<20}{'cases':>7}{'failures':>10}{'slowest ms':>12}{'seconds':>9}  cases by exit code")
    cases = failed = 0
    texts: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, _quiet_libraries():
        for number, door in enumerate(chosen):
            folder = Path(scratch).resolve() / str(number)
            folder.mkdir()
            outcome = run(door, folder, max(1, door.share * total // CASES), seed)
            ends = ", ".join(f"{code}: {count}" for code, count in sorted(outcome.ends.items()))
            print(
                f"{door.name:<20}{outcome.cases:>7}{outcome.failed:>10}{outcome.slowest_ms:>12.0f}{outcome.seconds:>9.1f}  {ends}",
                flush=True,
            )
            texts += [f"{door.name}: {text}" for text in outcome.failures.values()]
            cases, failed = cases + outcome.cases, failed + outcome.failed
    print(f"{'all':<20}{cases:>7}{failed:>10}")
    for text in texts:
        print(f"\n{text}")
    return 1 if failed else 0


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Decoders in C write what they think of a file to descriptor 2; a crash is still shown."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    with open(kept, "w") as stream:
        faulthandler.enable(stream)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            faulthandler.disable()
            os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
