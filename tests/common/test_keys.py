"""Keys of configurations: what their help says is what their class says."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, ValidationError

from common.keys import Key, describe_keys, list_keys
from common.options import Options
from probing.options import ProbeOptions
from training.config import SoftTargetConfig, TrainConfig


class Small(Options):
    """A configuration."""

    # --- the first group; with words
    size: int = Field(3, ge=1, le=9)  # ours: of it
    # above the line,
    # in two lines
    kind: Literal["a", "b"] | None = None

    # --- another group
    names: Annotated[list[str] | None, BeforeValidator(lambda value: value)] = None  # "#" is a mark, too
    share: float = Field(gt=0)  # of the whole
    args: dict[str, Any] = {}
    on: bool | str = True  # or text


def test_keys_have_the_meaning_that_stands_beside_them():
    group = "the first group; with words"
    assert list_keys(Small) == [
        Key("size", "of it", "whole number, at least 1, at most 9", "3", group),
        Key("kind", "above the line, in two lines", "a or b or null", "null", group),
        Key("names", '"#" is a mark, too', "list of text or null", "null", "another group"),
        Key("share", "of the whole", "number, above 0", None, "another group"),
        Key("args", "", "mapping {NAME: VALUE}", "{}", "another group"),
        Key("on", "or text", "true or false or text", "true", "another group"),
    ]
    assert "    --share (number, above 0; must be given)\n        of the whole\n" in describe_keys(Small)


@pytest.mark.parametrize("model", [TrainConfig, SoftTargetConfig, ProbeOptions])
def test_every_key_of_a_configuration_has_a_meaning(model):
    keys = list_keys(model)
    assert [key.name for key in keys] == list(model.model_fields)
    assert not [key.name for key in keys if len(key.meaning) < 5 and key.name != "patience"]
    assert all(f"--{key.name} (" in describe_keys(model) for key in keys)


def test_true_is_no_number():
    for key, value in (("size", True), ("share", True), ("names", True)):
        with pytest.raises(ValidationError, match=f"given without a value; write --{key} VALUE"):
            Small(**{"share": 0.5, key: value})
    assert Small(share=0.5, on=True).on is True
