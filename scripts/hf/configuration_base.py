"""Settings that all exported taggers have in common, for Hugging Face's transformers."""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class TaggerConfig(PretrainedConfig):
    """Settings of a tagger: the arguments of its network, its classes, its head.

    A subclass names the arguments of its network in `ARGUMENTS`, with their defaults. It defines `__init__` even where
    that only calls this one: transformers 5 makes a dataclass of every subclass, which writes an `__init__` otherwise.

    Args:
        **settings: those in `ARGUMENTS`, and those of every config: `id2label`, `num_labels`, and `problem_type`, which
            sets the activation: "multi_label_classification" by the sigmoid,
            "single_label_classification" by the softmax. `head`: where the classes are those of a head on the
            embeddings, its kind and arguments; None for the network's own last layer.
    """

    ARGUMENTS: ClassVar[dict[str, Any]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states"]

    def __init__(self, **settings: Any) -> None:
        if settings.get("problem_type") is None:
            settings["problem_type"] = "multi_label_classification"
        self.head = settings.pop("head", None)
        for name, default in self.ARGUMENTS.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(**settings)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in order."""
        names = {int(index): str(name) for index, name in (self.id2label or {}).items()}
        return [names[index] for index in range(len(names))]

    def network(self) -> dict[str, Any]:
        """Return the arguments of the network."""
        return {name: getattr(self, name) for name in self.ARGUMENTS}
