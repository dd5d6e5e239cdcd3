"""How merging tokens trades accuracy for speed: the tables of FastAST for any checkpoints and any labelled pack.

    python scripts/sweep_token_merging.py --test_data PACK.tsv --inference RUN,RUN,RUN
    python scripts/sweep_token_merging.py --test_data PACK.tsv --r 0,20,40 --inference RUN,RUN --output FOLDER
    python scripts/sweep_token_merging.py --test_data PACK.tsv --trained RUN_R0,RUN_R20,RUN_R40 --cmkd RUN_R0,RUN_R20

Every option that is not named below is a group of checkpoints (runs' folders, files, names), separated by commas.
Those of `--inference`, and of any name that begins so (`--inference_cmkd`), were trained without merging, say, and are
judged at every r of --r. Those of any other name (`--trained`, `--cmkd`) are judged as they are: each stands at the r
that it was trained with. Several checkpoints of a group for one r, seeds say, give a mean and a standard deviation.
"""

import inspect
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

# As in run.py: before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fire
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import Faults, print_user_errors
from common.files import whole_file, write_text
from models.devices import choose_device
from scripts.sweeps.results import figure, markdown, points_csv, rows_csv
from scripts.sweeps.token_merging import clock, judge, plan, rows_of
from training.config import Mode
from training.figures import render_png
from training.precision import Precision

OPTIONS = ("test_data", "r", "output", "metric", "batch_size", "rounds", "mode", "device", "num_workers")
RS = (0, 5, 10, 15, 20, 25, 30, 35, 40)  # those of the paper


@print_user_errors
def sweep(
    *,
    test_data: Any = None,
    r: Any = RS,
    output: str = "experiments/sweep_token_merging",
    metric: str = "auto",
    batch_size: int = 8,
    rounds: int = 5,
    mode: str = "fp32",
    device: str = "auto",
    num_workers: int = 2,
    **groups: Any,
) -> None:
    """Judge groups of checkpoints over r, the tokens merged away in each block, and time their networks.

    Prints the table and writes it to FOLDER/sweep.md, sweep.csv and sweep.png, and the value of each checkpoint to
    sweep_checkpoints.csv. Drops are those of each checkpoint against its own r = 0 (in a group of trained ones: against
    the one at the same place among those with r = 0), then averaged. clips/s is the network alone on a batch of
    spectrograms, so that reading sounds and the front-end do not count: the median of several passes, all settings of
    all networks in turns; checkpoints of one network share it.

    Args:
        test_data: TSV of a labelled pack. Several, separated by commas: the first checkpoint of each r is judged on the
            first pack, the second on the second, and so on, and again from the first; for folds.
        r: which r the inference groups are judged at; 0 is always among them.
        output: folder for the results.
        metric: accuracy (the highest of all classes is the clip's one label), mAP, or auto: accuracy for models that
            give exactly one class (softmax), mAP for others.
        batch_size: clips at once.
        rounds: passes over the batch that is timed.
        mode: fp32, tf32, bf16 or fp16.
        device: auto, cpu or cuda.
        num_workers: loader processes.
        groups: --NAME CHECKPOINT,CHECKPOINT; see above.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    listed = {name: _list(value) for name, value in groups.items()}
    rs, packs = _whole_numbers(r), _list(test_data)
    faults = Faults("the command")
    if not listed or not all(listed.values()):
        faults.add("no checkpoints are given: add --inference RUN,RUN (judged at every r), --trained RUN,RUN, or both")
    if not packs:
        faults.add("--test_data PACK.tsv is missing: a pack with a `labels` column")
    if rs is None:
        faults.add(f"--r is {r!r}; wanted whole numbers, 0 or more, such as 0,10,20")
    if mode not in get_args(Mode):
        faults.add(f"--mode is {mode!r}; use {', '.join(get_args(Mode))}")
    if any(not isinstance(n, int) or n < least for n, least in ((batch_size, 1), (rounds, 1), (num_workers, 0))):
        faults.add("--batch_size and --rounds are at least 1 and --num_workers at least 0, whole numbers")
    faults.raise_if_any()
    precision = Precision(mode, choose_device(device))
    over_all = [name for name in listed if name.startswith("inference")]
    checked = plan(listed, over_all, rs or [], packs, metric, OPTIONS)
    values = judge(checked, batch_size=batch_size, num_workers=num_workers, precision=precision)
    speeds = clock(checked, batch_size=batch_size, rounds=rounds, precision=precision)
    rows = rows_of(checked, values, speeds, len(packs))

    caption = _caption(precision.device, mode, batch_size, rounds, packs)
    text = f"{markdown(rows, checked.metric)}\n\n{caption}\n"
    folder = Path(output)
    write_text(folder / "sweep.csv", rows_csv(rows, checked.metric))
    write_text(folder / "sweep_checkpoints.csv", points_csv(checked.points, values, checked.metric))
    write_text(folder / "sweep.md", text)
    with whole_file(folder / "sweep.png") as partial:
        partial.write_bytes(render_png(figure(rows, checked.metric)))
    print(f"{text}\nresults: {folder}/sweep.csv, sweep_checkpoints.csv, sweep.md, sweep.png")


def _list(value: Any) -> list[str]:
    """Read what Fire made of `A,B`."""
    parts: Iterable[Any] = value if isinstance(value, (tuple, list)) else str("" if value is None else value).split(",")
    return [text for part in parts if (text := str(part).strip())]


def _whole_numbers(value: Any) -> list[int] | None:
    parts = _list(value)
    return sorted({0, *map(int, parts)}) if parts and all(part.isdecimal() for part in parts) else None


def _caption(device: torch.device, mode: str, batch_size: int, rounds: int, packs: list[str]) -> str:
    where = f"CPU threads: {torch.get_num_threads()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return (
        f"On {', '.join(packs)}. r: tokens merged away in each block. drop: in points, each checkpoint against its own "
        f"r = 0, negative where something is lost. ±: standard deviation. clips/s: the network alone on "
        f"spectrograms, {batch_size} clips at once, "
        f"{mode}, {where}, PyTorch {torch.__version__}, median of {rounds} passes, all settings in turns."
    )


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):  # Fire would take it for a group
        print(f"{__doc__}\n{inspect.getdoc(sweep)}")
        sys.exit()
    fire.Fire(sweep)
