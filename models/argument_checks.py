"""Types and bounds of the arguments of networks and front-ends, checked before these are built."""

import inspect
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from common.errors import UserError
from common.keys import describe_field
from models.frontends import FrontEnd, build_front_end
from models.settings import Bounds
from models.token_merging import MergingSetting


@cache
def _find_types(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the arguments of a network factory or front-end: name -> type."""
    plain: Any = getattr(factory, "func", factory)
    settings = [*getattr(plain, "shared_settings", ()), *filter(None, [getattr(plain, "defaults", None)])]
    sources = [inspect.getattr_static(plain, "__init__") if isinstance(plain, type) else plain, *map(type, settings)]
    found: dict[str, Any] = {}
    for source in sources:
        try:
            found |= get_type_hints(source, include_extras=True)
        except (NameError, TypeError):  # of a user's network, whose annotations are its own matter
            continue
    return found


def find_argument_faults(factory: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each argument whose value is not of its type or outside its bounds.

    Names of modes and schedules of token merging are checked by the network, whose messages are more specific.
    """
    types, faults = _find_types(factory), []
    for name, value in given.items():
        kind = types.get(name, Any)
        if kind == MergingSetting or _is_literal(kind):
            continue
        kind = _add_fields(kind)
        value = value.item() if isinstance(value, np.generic) else value
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError:
            expected = describe_field(FieldInfo.from_annotation(kind))
            faults.append(f"{name} is {value!r:.80}; expected {expected}")
    return faults


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal or any(map(_is_literal, get_args(kind)))


def _add_fields(kind: Any) -> Any:
    """Replace `Bounds` in a type by Pydantic's `Field`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        metadata = [Field(**vars(each)) if isinstance(each, Bounds) else each for each in arguments[1:]]
        return Annotated[_add_fields(arguments[0]), *metadata]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_add_fields, arguments))]  # noqa: UP007 - of a number of types known at run time
    if origin is None or any(map(_is_literal, arguments)) or origin is Callable:
        return kind
    return origin[tuple(map(_add_fields, arguments))]


def restore_front_end(description: Mapping[str, Any]) -> FrontEnd:
    """Build a front-end from its description in a file, see `FrontEnd.description`.

    Raises:
        UserError: an unknown class or argument, or an argument of another type or outside its bounds.
    """
    known = {kind.__name__: kind for kind in FrontEnd.__subclasses__()}
    name = description.get("class")
    if isinstance(name, str) and name in known:
        given = {key: value for key, value in description.items() if key not in ("class", "band_limit")}
        if faults := find_argument_faults(known[name], given):
            raise UserError(f"the front-end {name}: {'; '.join(faults)}")
    return build_front_end(description)
