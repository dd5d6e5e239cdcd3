"""Export a model to ONNX files, with the labels that sherpa-onnx reads beside them.

    python3 export_onnx.py -m ced_tiny --max-frames 1012
    python3 export_onnx.py -m experiments/mine/ --head birds --waveform
    python3 export_onnx.py -m experiments/mine/ --waveform --precision fp32,int8 --calibrate data/test.tsv
    python3 export_onnx.py -m experiments/four_bits/ --waveform --opset 18 --container int8

The input of a file is a log-mel spectrogram (`feats`), as in published exports, or with --waveform the samples
themselves; the output are probabilities. Files are compared with PyTorch before they are renamed to their final names.
--calibrate evaluates them on a labelled pack. A model that was trained with quantized weights is written with their
codes, which need opset 21 for 3 or 4 bits, 25 for 2 bits; see docs/export.md for the options of other runtimes.
"""

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field

from common.errors import Faults
from common.options import MergingOption, ModelOptions, parse_arguments
from models import load_tagger
from models.heads import check_classes
from models.onnx import check_label_table, export_onnx, name_files, resize_chunks, write_label_table
from models.onnx_comparison import Precision
from models.onnx_quantized import Container
from models.quantization import quantized_weights
from tagging.base import Engine
from tagging.engines import TorchEngine
from tagging.onnx_engine import OnnxEngine
from training.exported import compare_engines
from training.labelled import open_labelled


class ExportOptions(ModelOptions):
    """The options of export_onnx.py."""

    output: Path | None = None  # .onnx file; null = MODEL.onnx, and MODEL.PRECISION.onnx where that is not fp32
    # frames that the network takes at once, to which its time positions are resized; longer clips are cut and averaged
    # in any case. null = as the model was made, 1012 for CED
    max_frames: int | None = Field(None, ge=1)
    token_merging: MergingOption = None  # tokens merged in each block; null = the model's own setting
    waveform: bool = False  # take samples: include the front-end in the file
    # fp32, int8, fp16 (for GPUs: slower than fp32 on CPUs) or quantized (the codes of training), several with commas;
    # null = quantized for a model of quantized weights, else fp32,int8
    precision: list[Precision] | None = Field(None, min_length=1)
    opset: int | None = None  # version of ONNX's operators; null = the lowest possible: 18, or what `container` needs
    container: Container | None = None  # type of the codes: int2, int4 or int8; null = the smallest that holds them
    calibrate: str | None = None  # TSV of a labelled pack, to evaluate every file beside PyTorch
    labels_output: Path | None = None  # label table; null = class_labels_indices.csv beside the model

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for an unsuitable name."""
        if self.output is not None and self.output.suffix != ".onnx":
            yield f"--output expects a name that ends in .onnx, not {self.output}"


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Export the model of the command line."""
    options = parse_arguments(ExportOptions, __doc__, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("models").setLevel(logging.INFO)  # exporter and quantiser log every step at that level
    model = load_tagger(options.model, **options.model_dump(include={"weights", "head", "token_merging"}))
    check_classes(model, options.model)
    if options.max_frames:
        model = resize_chunks(model, options.max_frames)
    data = None
    if options.calibrate:
        faults = Faults("--calibrate")
        data = open_labelled(options.calibrate, model.labels, faults)
        faults.raise_if_any()
    output = options.output or Path(f"{model.full_name}.onnx")
    is_quantized = any(True for _ in quantized_weights(model))
    precisions: list[Precision] = options.precision or (["quantized"] if is_quantized else ["fp32", "int8"])
    files = name_files(output, precisions, options.output is not None)
    table = options.labels_output or output.with_name("class_labels_indices.csv")
    if options.labels_output is None:
        check_label_table(table, model.labels)
    differences = export_onnx(model, files, waveform=options.waveform, opset=options.opset, container=options.container)
    write_label_table(table, model.labels)
    for precision, path in files.items():
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, up to {differences[precision]:.1g} from PyTorch")
    print(f"{table}: {len(model.labels)} labels")
    if data is not None:
        torch.set_num_threads(1)
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        engines: dict[str, tuple[Engine, int]] = {"PyTorch fp32": (TorchEngine(model, n_threads=1), n_bytes)}
        engines |= {precision: (OnnxEngine(path), path.stat().st_size) for precision, path in files.items()}
        print(compare_engines(engines, data))


if __name__ == "__main__":
    main()
