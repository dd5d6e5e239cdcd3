"""The settings of quantized weights, as an argument of a model, with their checks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from common.errors import UserError, did_you_mean, some

SCOPES, SCHEMES, CLIPS = (
    ("tensor", "channel", "bucket"),
    ("symmetric", "minmax", "levels"),
    ("absmax", "mse", "learned"),
)


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantized.

    Attributes:
        weights: bits of a weight, 2 to 8.
        activations: 8 to round the inputs of the quantized layers to 8 bits, with a scale per time step, which depends
            on neither batch nor padding; None for float inputs.
        scope: which weights share a scale: "tensor", "channel" (a row, or the filter of an output channel) or "bucket"
            (`bucket_size` consecutive ones).
        scheme: "symmetric", "minmax" or "levels".
        clip: "absmax", "mse" or "learned"; None for mse below 5 bits and absmax from there on. Not for levels.
        skip: shell patterns of weights or modules that stay as they are, such as "patch_embed.*"; "depthwise" for all
            depthwise convolutions.
        start: share of a training run after which weights are quantized, 0 for the whole run. Validation and
            checkpoints are quantized throughout.
        bucket_size: n of scope "bucket".
        fold_batch_norm: fold batch norms into the convolutions before them; for quantization after training.
    """

    weights: int = 4
    activations: int | None = None
    scope: str = "channel"
    scheme: str = "symmetric"
    clip: str | None = None
    skip: tuple[str, ...] = ()
    start: float = 0.0
    bucket_size: int = 256
    fold_batch_norm: bool = False

    def __post_init__(self) -> None:
        checks: dict[str, tuple[bool, str]] = {
            "weights": (_is_int(self.weights) and 2 <= self.weights <= 8, "a number of bits, 2 to 8"),
            "activations": (
                self.activations is None or (_is_int(self.activations) and self.activations == 8),
                "null or 8",
            ),
            "scope": (self.scope in SCOPES, some(SCOPES)),
            "scheme": (self.scheme in SCHEMES, some(SCHEMES)),
            "clip": (self.clip is None or self.clip in CLIPS, f"null, {some(CLIPS)}"),
            "start": (_is_number(self.start) and 0 <= self.start < 1, "a share of the run, from 0 to below 1"),
            "bucket_size": (_is_int(self.bucket_size) and self.bucket_size >= 2, "a number of weights, at least 2"),
            "fold_batch_norm": (isinstance(self.fold_batch_norm, bool), "true or false"),
            "skip": (isinstance(self.skip, tuple) and all(isinstance(p, str) for p in self.skip), "a list of patterns"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise UserError(f"quantize: {name} is {getattr(self, name)!r:.80}; expected {expected}")
        if self.scheme == "levels" and self.clip is not None:
            raise UserError(f"quantize: the scheme levels trains its levels; leave clip out, not {self.clip!r}")

    @classmethod
    def parse(cls, settings: Any) -> "Quantization":
        """Return the settings of a mapping, such as that of a YAML file.

        Raises:
            UserError: no mapping, an unknown name, or a value out of range.
        """
        if not isinstance(settings, Mapping):
            raise UserError(f"quantize is {settings!r:.80}; expected settings, such as {{weights: 4}}")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                hint = did_you_mean(str(name), known) or f"; known are {some(known, 99)}"
                raise UserError(f"quantize: unknown setting {name!r:.80}{hint}")
        given = dict(settings)
        if isinstance(given.get("skip"), list):
            given["skip"] = tuple(given["skip"])
        return cls(**given)

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values, complete with their defaults."""
        return asdict(self) | {"skip": list(self.skip)}

    def group_size(self, shape: Sequence[int]) -> int:
        """Return the number of consecutive values of a weight that share a scale."""
        n = math.prod(shape)
        return min(n, {"tensor": n, "channel": n // shape[0], "bucket": self.bucket_size}[self.scope])

    @property
    def range(self) -> str:
        """`clip`, or its default for the number of bits; "levels" with that scheme."""
        if self.scheme == "levels":
            return "levels"
        return self.clip or ("mse" if self.weights < 5 else "absmax")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
