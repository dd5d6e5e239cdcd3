"""Pack a quantized model into one small file, whose weights are packed codes.

    python scripts/pack_quantized.py experiments/mine/latest -o mine.ceq
    python scripts/pack_quantized.py mine_4bit.pt --entropy --teacher resnet50_audio

The .ceq file is a model like every checkpoint: `-m mine.ceq`. Its predictions are those of the checkpoint, bit by bit,
unless `--rest fp16` rounds what is not quantized. Prints the bytes of its parts beside the same network in float32 and
the teacher, all without constants of the front-end. Checkpoints of float weights are quantized by scripts/quantize.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from common.columns import align_columns
from common.errors import UserError
from common.files import write_bytes
from common.options import Options, parse_arguments
from models import create_model, list_models, load_model
from models.packed import PACKED
from models.packing import PackedModel, count_bytes, pack_model

_PARTS = {
    "codes": "codes of quantized weights",
    "scales": "scales, zero points and levels",
    "rest": "biases, norms and other tensors",
    "description": "labels, settings, names of tensors",
}


class PackOptions(Options):
    """The options of pack_quantized.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("checkpoint",)
    SHORT: ClassVar[Mapping[str, str]] = {"output": "o"}

    checkpoint: str  # a quantized model: a checkpoint or the folder of a run
    output: Path | None = None  # .ceq file; null = the name of CHECKPOINT with that suffix, in the current folder
    entropy: bool = False  # compress the file by an entropy coder, LZMA; slower to read
    # type of what is not quantized: biases, norms, skipped weights; fp16 rounds them, so that predictions change
    rest: Literal["fp32", "fp16"] = "fp32"
    teacher: str | None = None  # name or checkpoint of a model, to compare sizes with

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for an unsuitable name."""
        if self.output is not None and self.output.suffix != PACKED:
            yield f"--output expects a name that ends in {PACKED}, not {self.output}"


def format_sizes(packed: PackedModel, teacher: int | None) -> str:
    """Lay out the bytes of a packed file, its parts, the float network and the teacher."""
    n_bytes = len(packed.data)
    rows = [["", "bytes", "of the student in fp32", "of the teacher" if teacher else ""]]
    lines = {"file": n_bytes} | {f"  {words}": packed.sizes[part] for part, words in _PARTS.items()}
    lines |= {"student in fp32": packed.full_size} | ({"teacher in fp32": teacher} if teacher else {})
    for name, size in lines.items():
        rows.append([name, f"{size:,}", f"{size / packed.full_size:.2%}", f"{size / teacher:.2%}" if teacher else ""])
    return align_columns(rows, "<>")


def measure_teacher(source: str) -> int:
    """Return the bytes of a model's weights; nothing is downloaded for a registered name."""
    return count_bytes(create_model(source) if source in list_models() else load_model(source))


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Pack the model, and print its size."""
    options = parse_arguments(PackOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output or Path(f"{Path(options.checkpoint).resolve().stem}{PACKED}")
    packed = pack_model(load_model(options.checkpoint), rest=options.rest, entropy=options.entropy)
    teacher = measure_teacher(options.teacher) if options.teacher else None
    if not output.parent.is_dir():
        raise UserError(f"{output}: its folder does not exist; create it")
    write_bytes(output, packed.data)
    print(format_sizes(packed, teacher))
    kept = "rounded to float16, so that predictions differ slightly" if packed.lossy else "kept bit by bit"
    print(f"written     {output} ({packed.n_quantized} quantized weights; all other tensors {kept})")


if __name__ == "__main__":
    main()
