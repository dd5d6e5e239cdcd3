"""How merging tokens trades accuracy for speed: the tables of FastAST for any checkpoints and any labelled pack.

    python scripts/sweep_token_merging.py --test_data PACK.tsv --inference RUN,RUN,RUN
    python scripts/sweep_token_merging.py --test_data PACK.tsv --r 0,20,40 --inference RUN,RUN --output FOLDER
    python scripts/sweep_token_merging.py --test_data PACK.tsv --trained RUN_R0,RUN_R20,RUN_R40 --cmkd RUN_R0,RUN_R20

Every option that is not named below is a group of checkpoints (runs' folders, files, names), separated by commas.
Those of `--inference`, and of any name that begins so (`--inference_cmkd`), were trained without merging, say, and are
judged at every r of --r. Those of any other name (`--trained`, `--cmkd`) are judged as they are: each stands at the r
that it was trained with. Several checkpoints of a group for one r, seeds say, give a mean and a standard deviation.

Prints the table and writes it to FOLDER/sweep.md, sweep.csv and sweep.png, and the value of each checkpoint to
sweep_checkpoints.csv. Drops are those of each checkpoint against its own r = 0 (in a group of trained ones: against the
one at the same place among those with r = 0), then averaged. clips/s is the network alone on a batch of spectrograms,
so that reading sounds and the front-end do not count: the median of several passes, all settings of all networks in
turns; checkpoints of one network share it.
"""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

# As in run.py: before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pydantic import ConfigDict, Field

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import print_user_errors
from common.files import whole_file, write_text
from common.options import Options, parse_arguments, parse_value
from models.devices import choose_device
from scripts.sweeps.results import figure, markdown, points_csv, rows_csv
from scripts.sweeps.token_merging import clock, judge, plan, rows_of
from training.config import Mode
from training.figures import png
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
    over_all = [name for name in groups if name.startswith("inference")]
    checked = plan(groups, over_all, sorted({0, *options.r}), packs, metric, tuple(SweepOptions.model_fields))
    values = judge(checked, batch_size=batch_size, num_workers=num_workers, precision=precision)
    speeds = clock(checked, batch_size=batch_size, rounds=rounds, precision=precision)
    rows = rows_of(checked, values, speeds, len(packs))

    caption = _caption(precision.device, mode, batch_size, rounds, packs)
    text = f"{markdown(rows, checked.metric)}\n\n{caption}\n"
    folder = Path(options.output)
    write_text(folder / "sweep.csv", rows_csv(rows, checked.metric))
    write_text(folder / "sweep_checkpoints.csv", points_csv(checked.points, values, checked.metric))
    write_text(folder / "sweep.md", text)
    with whole_file(folder / "sweep.png") as partial:
        partial.write_bytes(png(figure(rows, checked.metric)))
    print(f"{text}\nresults: {folder}/sweep.csv, sweep_checkpoints.csv, sweep.md, sweep.png")


def _caption(device: torch.device, mode: str, batch_size: int, rounds: int, packs: list[str]) -> str:
    where = f"CPU threads: {torch.get_num_threads()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return (
        f"On {', '.join(packs)}. r: tokens merged away in each block. drop: in points, each checkpoint against its own "
        f"r = 0, negative where something is lost. ±: standard deviation. clips/s: the network alone on "
        f"spectrograms, {batch_size} clips at once, "
        f"{mode}, {where}, PyTorch {torch.__version__}, median of {rounds} passes, all settings in turns."
    )


if __name__ == "__main__":
    main()
