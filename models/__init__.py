"""Networks, their front-ends, their registry and their weights.

Every file in this folder is imported, so that a model registered in one of them is found by being there.
"""

import importlib
import pkgutil

from models.base import AudioTagger
from models.creation import create_model
from models.ensemble import Ensemble
from models.heads import attach_head, list_heads, load_head, load_tagger
from models.labels import audioset_labels, read_labels
from models.loading import load_model, load_weights, save_checkpoint
from models.registry import get_model_entry, list_models, register_model
from models.ssondo import get_ssondo

for _file in pkgutil.iter_modules(__path__):
    if not _file.name.startswith("onnx"):  # no models, and imports of ONNX's exporter and runtime, which take seconds
        importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "AudioTagger",
    "Ensemble",
    "attach_head",
    "audioset_labels",
    "create_model",
    "get_model_entry",
    "get_ssondo",
    "list_heads",
    "list_models",
    "load_head",
    "load_model",
    "load_tagger",
    "load_weights",
    "read_labels",
    "register_model",
    "save_checkpoint",
]
