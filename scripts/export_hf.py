"""Write an audio transformer of CED, or a ResNet-10, as a folder that Hugging Face's transformers loads.

    python scripts/export_hf.py -m experiments/mine/checkpoint.pt my_tagger/
    python scripts/export_hf.py -m ced_mini --weights ced_mini.pt hub/ced-mini/
    python scripts/export_hf.py -m ced_mini --head birds hub/ced-mini-birds/

The folder holds weights, settings, names of the classes, a model card, and the code of the model; with `transformers`
and `torch` alone, and without a network, it is loaded by

    pipeline("audio-classification", model="my_tagger", trust_remote_code=True)

and by AutoModelForAudioClassification, AutoModel (embeddings), AutoFeatureExtractor and AutoConfig. This project reads
it as well: `-m my_tagger`. Fill in `license` in its README.md before you publish it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is used from its folder, not installed

# First: signals are handled from here on, also during the slow imports.
from common.entry_points import print_user_errors  # isort: split

import logging
from typing import ClassVar

from common.options import ModelOptions, parse_arguments
from models import load_tagger
from models.heads import check_classes
from scripts.hf.folder import export


class FolderOptions(ModelOptions):
    """The options of export_hf.py."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder",)

    folder: Path  # output; new or empty
    overwrite: bool = False  # replace an existing export, but not its README.md


@print_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Load the model and write the folder."""
    options = parse_arguments(FolderOptions, __doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_tagger(options.model, weights=options.weights, head=options.head)
    check_classes(model, options.model)
    export(model, options.folder, overwrite=options.overwrite)
    print(f"written     {options.folder} ({model.full_name}, {model.num_classes} classes, {model.sample_rate} Hz)")


if __name__ == "__main__":
    main()
