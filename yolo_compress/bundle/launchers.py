"""The commands at the root of a bundle, such as `detect.py`.

Each command starts a module of `runtime/`. If the robot lacks something, the command says so in one line.
"""

from __future__ import annotations

# Any `python3` or `python` may parse this, so the syntax is that of Python 2.7.
_TEXT = """#!/usr/bin/env python3
import os
import sys

sys.dont_write_bytecode = True  # a .pyc would be a file that the manifest does not list
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def lacks(what):
    sys.stderr.write("error: %s\\n" % what)
    sys.exit(4)


if sys.version_info < (3, 8):
    lacks("Python 3.8 or newer expected, this is %d.%d; start {command}.py with a newer one" % sys.version_info[:2])
try:
    from runtime.commands.{command} import main
except ImportError as error:
    if "numpy" not in str(error):
        raise
    lacks("%s; install numpy for %s" % (str(error).strip().splitlines()[0], sys.executable))

if __name__ == "__main__":
    sys.exit(main())
"""


def launcher(command: str) -> str:
    """Return the source of `command`.py, which starts `runtime/commands/<command>.py`.

    If Python is too old or numpy is missing, the exit code of the launcher is 4.
    """
    return _TEXT.format(command=command)
