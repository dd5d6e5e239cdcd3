"""Quantize the weights of a trained model, without further training.

    python scripts/quantize.py experiments/mine/latest --bits 4 -o mine_4bit.pt
    python scripts/quantize.py mn04_as --bits 4 --fold_batch_norm --skip depthwise -o mn04_4bit.pt

The new checkpoint is loaded like every other one and computes with the quantized weights; a head on the model stays
float. Prints the share of the weights' energy that rounding loses (squared error over squared weights), and the size of
the model once scripts/pack_quantized.py has packed it. Quantization while training (`quantize` in `model_args`) loses
less at 2 and 3 bits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import nn

from common.columns import align_columns
from common.errors import UserError
from common.options import Options, parse_arguments
from models import AudioTagger, load_model, save_checkpoint
from models.creation import quantize_tagger
from models.headed import HeadedTagger
from models.packing import pack_model
from models.quantization import is_depthwise, quantized_weights

_KINDS = {nn.Linear: "linear", nn.RNNBase: "recurrent", nn.MultiheadAttention: "attention"}


class QuantizeOptions(Options):
    """The options of quantize.py; from `scheme` on, those of `quantize` in a configuration."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("checkpoint",)
    SHORT: ClassVar[Mapping[str, str]] = {"output": "o"}

    checkpoint: str  # a model of float weights: a checkpoint, the folder of a run, or a name
    output: Path | None = None  # .pt file; null = NAME_4bit.pt for 4 bits, in the current folder
    weights: str | None = None  # file or URL of the weights of a model given by name
    bits: int = Field(4, ge=2, le=8)  # of a weight
    scheme: Literal["symmetric", "minmax", "levels"] = "symmetric"  # the grid
    clip: Literal["absmax", "mse"] | None = None  # range of the grid; null = mse below 5 bits, absmax from there on
    scope: Literal["channel", "tensor", "bucket"] = "channel"  # which weights share a scale
    bucket_size: int = Field(256, ge=2)  # weights that share a scale, with scope bucket
    skip: list[str] = Field([])  # patterns of weights or modules that stay float; "depthwise"
    activations: Literal[8] | None = None  # 8 rounds the inputs of quantized layers, too
    fold_batch_norm: bool = False  # fold batch norms into the convolutions before them

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence for an unsuitable name."""
        if self.output is not None and self.output.suffix != ".pt":
            yield f"--output expects a name that ends in .pt, not {self.output}"

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of `quantize`."""
        names = {"scheme", "clip", "scope", "bucket_size", "skip", "activations", "fold_batch_norm"}
        return {"weights": self.bits} | self.model_dump(include=names)


@torch.no_grad()
def measure_losses(model: AudioTagger) -> dict[str, tuple[int, float, float]]:
    """Return the kinds of layers of a quantized model before `bake_parametrizations`.

    Returns:
        Kind -> number of weights, their energy, and the energy of what rounding changes; "all" is the last one.
    """
    losses: dict[str, tuple[int, float, float]] = {}
    for _, module, name, _ in quantized_weights(model):
        weight = cast(Any, module).parametrizations[name].original.double()
        changed = weight - getattr(module, name)
        conv = "depthwise convolution" if is_depthwise(module) else "convolution"
        kind = next((words for layer, words in _KINDS.items() if isinstance(module, layer)), conv)
        own = (weight.numel(), float(weight.square().sum()), float(changed.square().sum()))
        for key in (kind, "all"):
            before = losses.pop(key, (0, 0.0, 0.0))
            losses[key] = (before[0] + own[0], before[1] + own[1], before[2] + own[2])
    return losses


@print_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize the model of the command line."""
    options = parse_arguments(QuantizeOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = Path(options.checkpoint).resolve()
    output = options.output or Path(f"{source.stem}_{options.bits}bit.pt")
    if not output.parent.is_dir():
        raise UserError(f"{output}: its folder does not exist; create it")
    if output.resolve() == source:
        raise UserError(f"{output} is the checkpoint of float weights, which would be lost: give another name with -o")
    model = load_model(options.checkpoint, weights=options.weights)
    network = model.model if isinstance(model, HeadedTagger) else model
    if recipe := network.arguments.get("quantize"):
        raise UserError(
            f"{options.checkpoint} would be quantized twice: it has weights of {recipe['weights']} bits already; give "
            "the checkpoint of float weights"
        )
    quantize_tagger(network, options.recipe)
    network.eval()
    rows = [["layers", "weights", "energy lost"]]
    for kind, (n_weights, energy, lost) in measure_losses(network).items():
        rows.append([kind, f"{n_weights:,}", f"{lost / max(energy, 1e-300):.3%}"])
    save_checkpoint(output, model)
    packed = pack_model(load_model(output))
    print(align_columns(rows, "<>"))
    share = len(packed.data) / packed.full_size
    print(f"written     {output}; packed, {len(packed.data):,} bytes, {share:.2%} of float32")


if __name__ == "__main__":
    main()
