"""Entry point of the command line. `grammar` parses it, and the table in `verbs` names the function in `cli/<verb>.py` to call.

Progress and errors go to stderr. Results go to stdout: a table if the verb has one, then a JSON document on the last line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType

from yolo_compress import ranks
from yolo_compress.cli import grammar, processes
from yolo_compress.cli.verbs import STAGE, VERBS, Verb
from yolo_compress.errors import Terminated
from yolo_compress.exits import explain

# How long OpenMP threads of torch wait for work before they sleep. The default takes processors from other
# programs: beside them a training step takes several times as long (benchmarks/beside_other_work.py).
OPENMP_WAIT = {"GOMP_SPINCOUNT": "1000"}

Handler = Callable[[grammar.Command], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `yolo-compress` and return its exit code. errors.py and exits.py list the exit codes."""
    signal.signal(signal.SIGTERM, _terminate)
    _share_processors()
    continues = False
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        command = grammar.parse(words)
        verb = VERBS[command.verb]
        continues = verb.continues
        _check_outside_store(verb, command)
        if (code := processes.start(command, words, is_stage=verb.handler == STAGE)) is not None:
            return code
        return handler(verb)(command)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if ranks.several():  # a launcher that stops all ranks would interrupt a rank that is about to exit
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return explain(error, continues)


def handler(verb: Verb) -> Handler:
    """Import and return the function that runs a verb."""
    module, _, function = verb.handler.partition(":")
    found: Handler = getattr(import_module(module), function)
    return found


def _share_processors() -> None:
    """Set `OPENMP_WAIT`, unless the user has set how OpenMP waits. It must be set before torch is imported."""
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", *OPENMP_WAIT)):
        os.environ.update(OPENMP_WAIT)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _check_outside_store(verb: Verb, command: grammar.Command) -> None:
    """Check that no output path of the command is inside the store. Raise RecipeError otherwise."""
    written = [option.name for option in verb.options if option.writes and option.name in command.options]
    if not written:
        return
    from pathlib import Path

    from yolo_compress import home
    from yolo_compress.store.store import Store

    for name in written:
        Store(home.weights()).check_outside(Path(command.options[name]), name)
