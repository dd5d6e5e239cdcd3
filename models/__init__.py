"""What computes: front-ends, networks, their registry, and their weights."""

from models import (  # noqa: F401  (they register their models)
    audio_spectrogram_transformer,
    audiotransformer,
    dymn,
    efficientnet,
    mobilenetv3,
    passt,
    resnet,
    ssondo_students,
)
from models.base import AudioTagger
from models.ensemble import Ensemble
from models.heads import attach_head, list_heads, load_head, load_tagger
from models.labels import audioset_labels, read_labels
from models.loading import load_model, load_weights, save_checkpoint
from models.registry import create_model, list_models, published_initialisation, published_weights, register_model
from models.ssondo import get_ssondo

__all__ = [
    "AudioTagger",
    "Ensemble",
    "attach_head",
    "audioset_labels",
    "create_model",
    "get_ssondo",
    "list_heads",
    "list_models",
    "load_head",
    "load_model",
    "load_tagger",
    "load_weights",
    "published_initialisation",
    "published_weights",
    "read_labels",
    "register_model",
    "save_checkpoint",
]
