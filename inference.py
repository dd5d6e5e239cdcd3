"""Tag sound files: which classes are heard, chunk by chunk.

    python inference.py SOUND.wav FOLDER/ -m ced_mini -k 3 -c 10
    python inference.py FOLDER/ -m experiments/mine/checkpoint.pt --output tags.csv

Folders are searched with everything below them; any format that libsndfile reads, any sample rate and any length will
do. Files that cannot be read are listed at the end, and the exit status is then 1.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

# Before torch loads OpenMP: threads that spin while they wait cost tenfold where decoders share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tqdm import tqdm

from audio.io import find_audio_files
from common.errors import print_user_errors
from models import load_model
from training.precision import choose_device
from training.tagging import TaggedFile, tag_files, tag_writer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Tag sound files chunk by chunk.")
    parser.add_argument("sounds", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("-m", "--model", default="ced_mini", help="a model's name, a checkpoint, or a run's folder")
    parser.add_argument("-k", "--topk", type=int, default=3, help="labels of each chunk (default %(default)s)")
    parser.add_argument("-c", "--chunk_length", type=float, default=10.0, help="in seconds (default %(default)s)")
    parser.add_argument("--weights", help="file or address with the weights of the model named by -m")
    parser.add_argument("--output", type=Path, help="write the tags to this .csv or .jsonl too")
    parser.add_argument("--batch_size", type=int, default=16, help="chunks a batch (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--n_workers", type=int, default=2, help="decoding threads (default %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("topk", "chunk_length", "batch_size", "n_workers"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, not {getattr(options, name)}")
    return options


def report(file: TaggedFile) -> str:
    """Lay a file's tags out as text, a line for each chunk."""
    lines = [str(file.path)]
    for chunk in file.chunks:
        tags = ", ".join(f"{label} {probability:.3f}" for label, probability in chunk.tags)
        lines.append(f"  [{chunk.start:6.1f} - {chunk.end:6.1f} s]  {tags}")
    return "\n".join(lines)


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Tag what the command line names."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = choose_device(options.device)
    paths = find_audio_files(options.sounds)
    unreadable, seconds, start = [], 0.0, time.perf_counter()
    with tag_writer(options.output) as write:
        model = load_model(options.model, weights=options.weights, device=device)
        tagged = tag_files(
            model,
            paths,
            chunk_seconds=options.chunk_length,
            top_k=options.topk,
            batch_size=options.batch_size,
            n_workers=options.n_workers,
            device=device,
        )
        with tqdm(total=len(paths), unit="file", file=sys.stderr) as progress:
            for file in tagged:
                if file.fault is not None:
                    unreadable.append(file)
                else:
                    write(file)
                    tqdm.write(report(file), file=sys.stdout)
                    seconds += file.chunks[-1].end
                progress.set_postfix_str(f"{seconds / (time.perf_counter() - start):.0f} x real time", refresh=False)
                progress.update()
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} files could not be read:", file=sys.stderr)
        for file in unreadable:
            print(f"  {file.path}: {file.fault}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
