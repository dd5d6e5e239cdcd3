"""Measure accuracy and speed over the number of merged tokens: the tables of FastAST for any checkpoints and pack.

    python scripts/sweep_token_merging.py --test_data PACK.tsv --inference RUN,RUN,RUN
    python scripts/sweep_token_merging.py --test_data PACK.tsv --r 0,20,40 --inference RUN,RUN --output FOLDER
    python scripts/sweep_token_merging.py --test_data PACK.tsv --trained RUN_R0,RUN_R20,RUN_R40 --cmkd RUN_R0,RUN_R20

Every option that is not named below is a group of checkpoints (runs' folders, files, names), separated by commas.
Those of `--inference`, and of any name that begins so (`--inference_cmkd`), are evaluated at every r of --r. Those of
any other name (`--trained`, `--cmkd`) are evaluated at the r that they were trained with. Several checkpoints of a
group for one r, such as seeds, give a mean and a standard deviation.

Prints the table and writes it to FOLDER/sweep.md, sweep.csv and sweep.png, and the value of each checkpoint to
sweep_checkpoints.csv. A drop is the difference of a checkpoint to itself at r = 0 (in a group of trained ones: to the
checkpoint at the same place among those with r = 0), then averaged. clips/s is the speed of the network alone on a
batch of spectrograms, without reading and front-end: the median of several passes, all settings of all networks in
alternation; checkpoints of one network share it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
import os
from collections.abc import Iterator
from typing import Annotated

# Before torch loads OpenMP, as in run.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pydantic import ConfigDict, Field

from common.files import write_bytes, write_text
from common.options import Options, parse_arguments, parse_value
from models.devices import choose_device
from scripts.benchmarks.timing import describe_device
from scripts.sweeps.results import draw_sweep, format_points_csv, format_rows, format_rows_csv
from scripts.sweeps.token_merging import evaluate_points, measure_speeds, plan_sweep, summarise_points
from training.config import Mode
from training.figures import render_png
from training.precision import Precision

RS = (0, 5, 10, 15, 20, 25, 30, 35, 40)  # those of the paper


class SweepOptions(Options):
    """The options of sweep_token_merging.py; every other name is that of a group of checkpoints."""

    model_config = ConfigDict(extra="allow")

    # TSV of a labelled pack. Several, separated by commas, for folds: the first checkpoint of each r is evaluated on
    # the first pack, the second on the second, and so on, and again from the first
    test_data: list[str] = Field(min_length=1)
    # numbers of tokens merged in each block, at which the inference groups are evaluated; 0 is always among them
    r: list[Annotated[int, Field(ge=0)]] = Field(list(RS))
    output: str = "experiments/sweep_token_merging"  # folder for the results
    # accuracy (the highest of all classes is the clip's one label), mAP, or auto: accuracy for models whose classes
    # exclude each other (softmax), mAP for others
    metric: str = "auto"
    batch_size: int = Field(8, ge=1)  # clips at once
    rounds: int = Field(5, ge=1)  # passes over the batch that is timed
    mode: Mode = "fp32"  # precision
    device: str = "auto"  # auto, cpu or cuda
    num_workers: int = Field(2, ge=0)  # loader processes

    @property
    def groups(self) -> dict[str, list[str]]:
        """The checkpoints of each group."""
        return {name: parse_value(str(value), list[str]) for name, value in (self.model_extra or {}).items()}

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence where there are no checkpoints."""
        if not self.groups or not all(self.groups.values()):
            yield "no checkpoints are given: add --inference RUN,RUN (evaluated at every r), --trained RUN,RUN, or both"


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Evaluate groups of checkpoints over r, the tokens merged in each block, and time their networks."""
    options = parse_arguments(SweepOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    groups, packs, metric = options.groups, options.test_data, options.metric
    batch_size, rounds, num_workers, mode = options.batch_size, options.rounds, options.num_workers, options.mode
    precision = Precision(mode, choose_device(options.device))
    inference_groups = [name for name in groups if name.startswith("inference")]
    names = tuple(SweepOptions.model_fields)
    sweep = plan_sweep(groups, inference_groups, sorted({0, *options.r}), packs, metric, names)
    values = evaluate_points(sweep, batch_size=batch_size, num_workers=num_workers, precision=precision)
    speeds = measure_speeds(sweep, batch_size=batch_size, rounds=rounds, precision=precision)
    rows = summarise_points(sweep, values, speeds, len(packs))
    text = (
        f"{format_rows(rows, sweep.metric)}\n\n"
        f"On {', '.join(packs)}. r: tokens merged in each block. drop: difference of each checkpoint to r = 0, in "
        f"points. ±: standard deviation. clips/s: the network alone on spectrograms, {batch_size} clips at once, "
        f"{mode}, {describe_device(precision.device)}, PyTorch {torch.__version__}, median of {rounds} passes, all "
        "settings in alternation.\n"
    )
    folder = Path(options.output)
    write_text(folder / "sweep.csv", format_rows_csv(rows, sweep.metric))
    write_text(folder / "sweep_checkpoints.csv", format_points_csv(sweep.points, values, sweep.metric))
    write_text(folder / "sweep.md", text)
    write_bytes(folder / "sweep.png", render_png(draw_sweep(rows, sweep.metric)))
    print(f"{text}\nresults: {folder}/sweep.csv, sweep_checkpoints.csv, sweep.md, sweep.png")


if __name__ == "__main__":
    main()
