"""`run.py` with the methods of this folder: `python tests/training/methods/train.py train CONFIG.yaml`."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.training import methods  # noqa: E402, F401  (it registers its objectives)

if __name__ == "__main__":
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
