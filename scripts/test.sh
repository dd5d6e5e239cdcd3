#!/usr/bin/env bash
# Lint, types and tests. `bash scripts/test.sh long` adds the tests that take minutes; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements-dev.txt
bin="$VENV/bin"
selection=(-m "not long")
if [ "${1:-}" = long ]; then selection=() && shift; fi
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
# One test process a core; the tests of a file run in one process, since they share fixtures.
"$bin/python" -m pytest -q --durations=15 -n auto --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
