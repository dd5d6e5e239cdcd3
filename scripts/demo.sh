#!/usr/bin/env bash
# The whole pipeline on synthetic sounds, on a machine with nothing but Python: pack, train, distil, evaluate, tag.
# Arguments are passed on to scripts/demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements.txt
exec "$VENV/bin/python" scripts/demo.py "$@"
