"""Settings of CED for Hugging Face's transformers: the arguments of the network, under the names CED published."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from models.audiotransformer import ARGUMENTS


class CedConfig(PretrainedConfig):
    """What a CED model is made of.

    Args:
        **settings: those of the network (see `AudioTransformer`: embed_dim, depth, num_heads, pooling, target_length,
            sample_rate, ...; what is not given is as in CED-base), and those of every config: `id2label`, `num_labels`,
            and `problem_type`, which says how logits become probabilities: "multi_label_classification" by the sigmoid,
            "single_label_classification" by the softmax. `outputdim`, CED's name for the number of classes, counts
            where neither `id2label` nor `num_labels` is given. `head`: where the classes are those of a head on the
            embeddings, its `hidden_sizes` and `dropout`; None for the network's own last layer.
    """

    model_type = "ced"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states"]

    def __init__(self, **settings: Any) -> None:
        outputdim = settings.pop("outputdim", 527)
        if settings.get("id2label") is None:
            settings.setdefault("num_labels", outputdim)
        if settings.get("problem_type") is None:
            settings["problem_type"] = "multi_label_classification"
        self.head = settings.pop("head", None)
        for name, default in ARGUMENTS.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(**settings)

    @property
    def outputdim(self) -> int:
        """Number of classes, under CED's name."""
        return len(self.id2label or ())

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in order."""
        names = {int(index): str(name) for index, name in (self.id2label or {}).items()}
        return [names[index] for index in range(len(names))]

    def network(self) -> dict[str, Any]:
        """Return the arguments of the network."""
        return {name: getattr(self, name) for name in ARGUMENTS}

    def to_dict(self) -> dict[str, Any]:
        """Return all settings, with `outputdim` for CED's own code."""
        return super().to_dict() | {"outputdim": self.outputdim}
