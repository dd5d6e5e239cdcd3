#!/usr/bin/env bash
# The main job on sounds made by formula, on a machine with nothing but Python: pack, teach, distil, evaluate, tag.
# Arguments are passed on to scripts/demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements.txt
exec "$VENV/bin/python" scripts/demo.py "$@"
