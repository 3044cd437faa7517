#!/usr/bin/env bash
# Make the virtual environment $2 with python $1, from constraints.txt; does nothing when it is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2
stamp=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$(cat "$venv/.complete" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup: $python is older than Python 3.11; make setup PYTHON=python3.11" >&2; exit 4; }
echo "setup: making $venv (torch and friends, some minutes)" >&2
"$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' >&2
printf '%s\n' "$stamp" > "$venv/.complete"
echo "setup: done" >&2
