"""Export a model to ONNX files, with the labels that sherpa-onnx wants beside them.

    python3 export_onnx.py -m ced_tiny --max-frames 1012
    python3 export_onnx.py -m experiments/mine/ --head birds --waveform
    python3 export_onnx.py -m experiments/mine/ --waveform --precision fp32,int8 --calibrate data/test.tsv

Files take log-mel spectrograms (`feats`), as published exports do, or with --waveform the samples themselves, and give
probabilities. They are compared with PyTorch before they get their names. --calibrate judges them on a labelled pack.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from audio.io import resample
from common.errors import Faults, UserError, print_user_errors
from common.numbers import read_merging
from common.parser import Parser
from models import AudioTagger, load_tagger
from models.heads import check_classes
from models.onnx import PRECISIONS, Precision, export_onnx, format_label_table, resize_chunks, write_label_table
from tagging.base import Engine
from tagging.engines import TorchEngine
from tagging.onnx_engine import OnnxEngine
from training.labelled import LabelledPack, open_labelled
from training.metrics import evaluate_scores


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description="Export a model to ONNX.")
    parser.add_argument("-m", "--model", default="ced_mini", help="a model's name, a checkpoint, a run's folder, ...")
    parser.add_argument("--weights", help="file or address with the weights of the model named by -m")
    parser.add_argument("--head", help="write this head's classes: a name in heads/, or a head's file")
    parser.add_argument("--output", type=Path, help="default: MODEL.onnx, and MODEL.int8.onnx for another precision")
    parser.add_argument(
        "--max-frames",
        "--max_frames",
        type=int,
        default=None,
        help="frames that go through the network in one piece; its time positions are stretched to it. Longer clips "
        "are cut and averaged, whatever it is (default: what the model was made for, 1012 for CED)",
    )
    parser.add_argument(
        "--token_merging", "--token-merging", type=read_merging, help="tokens merged in each block (as the model says)"
    )
    parser.add_argument("--waveform", action="store_true", help="take samples: put the front-end into the file")
    parser.add_argument(
        "--precision",
        default="fp32,int8",
        help="of fp32, int8, and fp16, which is for GPUs: slower than fp32 on CPUs (default %(default)s)",
    )
    parser.add_argument("--calibrate", metavar="LIST.tsv", help="judge every file on a labelled pack, beside PyTorch")
    parser.add_argument(
        "--labels_output", "--labels-output", type=Path, help="default: class_labels_indices.csv beside the model"
    )
    options = parser.parse_args(arguments)
    options.precision = list(dict.fromkeys(options.precision.replace(" ", "").split(",")))
    unknown = [name for name in options.precision if name not in PRECISIONS]
    if unknown:
        parser.error(f"--precision knows {', '.join(PRECISIONS)}, not {', '.join(unknown)}")
    if options.max_frames is not None and options.max_frames < 1:
        parser.error(f"--max-frames must be above 0, not {options.max_frames}")
    if options.output is not None and options.output.suffix != ".onnx":
        parser.error(f"--output wants a name that ends in .onnx, not {options.output}")
    return options


def names(output: Path, precisions: Sequence[Precision], chosen: bool) -> dict[Precision, Path]:
    """Name the file of each precision: `output` for float32 or for the only one whose name was chosen."""
    if chosen and len(precisions) == 1:
        return {precisions[0]: output}
    return {each: output if each == "fp32" else output.with_suffix(f".{each}.onnx") for each in precisions}


def holds_other_labels(table: Path, labels: list[str]) -> bool:
    """Whether a file is there that is not the table of these labels."""
    return table.exists() and table.read_text(encoding="utf-8", errors="replace") != format_label_table(labels)


def judge(engine: Engine, data: LabelledPack) -> tuple[float, float]:
    """Return mAP and milliseconds a clip, one clip at a time; what is too long for the engine is cut and averaged."""
    scores, seconds = np.zeros((len(data.pack), len(engine.labels)), np.float32), 0.0
    for row in range(len(data.pack)):
        clip = resample(data.pack.read(row), data.pack.sample_rate, engine.sample_rate)
        longest = engine.max_samples or len(clip)
        windows = [clip[start : start + longest] for start in range(0, len(clip), longest)]
        begin = time.perf_counter()
        scores[row] = engine.predict(windows).mean(0)
        seconds += time.perf_counter() - begin
    return evaluate_scores(scores, data.multi_hot()).mAP, 1000 * seconds / len(data.pack)


def calibration(model: AudioTagger, files: dict[Precision, Path], data: LabelledPack) -> str:
    """Lay out what every file is worth, beside PyTorch, as a table; one thread."""
    torch.set_num_threads(1)
    lines = [f"{'':12}{'mAP':>8}{'loss':>8}{'MB':>8}{'ms/clip':>9}   ({len(data.pack)} clips of {data.pack.manifest})"]
    reference, milliseconds = judge(TorchEngine(model, n_threads=1), data)
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    lines.append(f"{'PyTorch fp32':12}{reference:8.4f}{'':8}{n_bytes / 1e6:8.2f}{milliseconds:9.1f}")
    for precision, path in files.items():
        value, milliseconds = judge(OnnxEngine(path), data)
        loss = 100 * (reference - value)
        lines.append(
            f"{precision:12}{value:8.4f}{loss:8.2f}{path.stat().st_size / 1e6:8.2f}{milliseconds:9.1f}   {path}"
        )
    return "\n".join([*lines, "loss: of mAP against PyTorch, in points of 0.01"])


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Export what the command line names."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("models").setLevel(logging.INFO)  # the exporter and the quantiser tell every step at that level
    chosen = {name: getattr(options, name) for name in ("weights", "head", "token_merging")}
    model = load_tagger(options.model, **chosen)
    check_classes(model, options.model)
    if options.max_frames:
        model = resize_chunks(model, options.max_frames)
    data = None
    if options.calibrate:
        faults = Faults("--calibrate")
        data = open_labelled(options.calibrate, model.labels, faults)
        faults.raise_if_any()
    output = options.output or Path(f"{model.full_name}.onnx")
    files = names(output, options.precision, options.output is not None)
    table = options.labels_output or output.with_name("class_labels_indices.csv")
    if options.labels_output is None and holds_other_labels(table, model.labels):
        raise UserError(
            f"{table}: holds other labels than those of {options.model}, for another model in this folder; give the "
            "table another name with --labels-output, or write to another folder with --output"
        )
    differences = export_onnx(model, files, waveform=options.waveform)
    write_label_table(table, model.labels)
    for precision, path in files.items():
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, up to {differences[precision]:.1g} from PyTorch")
    print(f"{table}: {len(model.labels)} labels")
    if data is not None:
        print(calibration(model, files, data))


if __name__ == "__main__":
    main()
