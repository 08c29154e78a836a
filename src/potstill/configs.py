"""What every config has in common: plain Python values, and settings by the names of its fields."""

from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from potstill.errors import InputError, meant

MOST = 1 << 40  # of steps, samples or epochs: what is above is a slip of the finger
MOST_ENVS = 1 << 16


def normalise(config: Any) -> None:
    """Makes numpy's numbers Python's and lists tuples, in a frozen config's `__post_init__`, so that JSON takes it.

    Raises:
        InputError: a number is too large for 64 bits.
    """
    for field in fields(config):
        value = _plain(getattr(config, field.name))
        object.__setattr__(config, field.name, value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise InputError(f"{field.name.replace('_', '-')} must be below 2^63, not {number}")


def bounded(config: Any, **limits: int) -> None:
    """Raises InputError where an integer field is below 1 or above its limit."""
    for name, limit in limits.items():
        value, flag = getattr(config, name), name.replace("_", "-")
        if value < 1:
            raise InputError(f"{flag} must be at least 1, not {value}")
        if value > limit:
            raise InputError(f"{flag} must be at most {limit:,}, not {value:,}")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def filled(settings: dict[str, Any], *configs: Any) -> tuple[Any, ...]:
    """The configs with these settings in the fields of those names; those of a network within a config are its own.

    Raises:
        InputError: none has such a field, or it is of another type.
    """
    left, known = dict(settings), []

    def fill(config: Any) -> Any:
        hints, changes = get_type_hints(type(config)), {}
        for field in fields(config):
            known.append(field.name)
            value = getattr(config, field.name)
            if field.name in left:
                changes[field.name] = given = _plain(left.pop(field.name))
                if not (is_dataclass(value) and type(given) is type(value)) and not fits(given, hints[field.name]):
                    raise InputError(f"{field.name} cannot be {given!r}; by default it is {value!r}")
            elif is_dataclass(value):
                changes[field.name] = fill(value)
        return replace(config, **changes)

    made = tuple(fill(config) for config in configs)
    for name in left:
        raise InputError(f"there is no setting {name!r}: {meant(name, known)}")
    return made


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a config's type: a scalar, a Literal, a tuple of one type, or one of several."""
    kind, options = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, option) for option in options)
    if kind is Literal:
        return isinstance(value, str) and value in options
    if kind is tuple:
        return isinstance(value, tuple) and all(fits(item, options[0]) for item in value)
    if hint is float:  # asdict writes 1.0 as 1.0, but people write 1
        return type(value) in (int, float)
    return type(value) is hint
