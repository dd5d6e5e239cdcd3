"""Settings of CED for Hugging Face's transformers: the arguments of the network, under the names CED published."""

from typing import Any, ClassVar

from models.audiotransformer import ARGUMENTS
from scripts.hf.configuration_base import TaggerConfig


class CedConfig(TaggerConfig):
    """What a CED model is made of.

    Args:
        **settings: those of the network (see `AudioTransformer`: embed_dim, depth, num_heads, pooling, target_length,
            sample_rate, ...; what is not given is as in CED-base), and those of every tagger (see `TaggerConfig`).
            `outputdim`, CED's name for the number of classes, counts where neither `id2label` nor `num_labels` does.
    """

    model_type = "ced"
    ARGUMENTS: ClassVar[dict[str, Any]] = ARGUMENTS
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
    }

    def __init__(self, **settings: Any) -> None:
        outputdim = settings.pop("outputdim", 527)
        if settings.get("id2label") is None:
            settings.setdefault("num_labels", outputdim)
        super().__init__(**settings)

    @property
    def outputdim(self) -> int:
        """Number of classes, under CED's name."""
        return len(self.id2label or ())

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, with `outputdim` for CED's own code."""
        return super().to_dict() | {"outputdim": self.outputdim}
