"""Checks of arguments that end in an error naming the argument, the value and the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_gradclip.names import did_you_mean

LearningRateSchedule = keras.optimizers.schedules.LearningRateSchedule

#: Of float32: normal numbers, for TensorFlow and XLA take smaller ones for 0.
_SMALLEST = float(np.finfo("float32").tiny)
_LARGEST = float(np.finfo("float32").max)
CLIP_NOTHING = "To clip nothing, pass `clipper=None` (or None as the rule of a ClipMap)."


def positive(owner: str, name: str, value: object) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is not a number, not finite, not above 0, or not one that float32 has.
    """
    is_number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    result = None
    try:
        if is_number and not isinstance(value, bool):
            result = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond every float
        result = math.inf
    except (TypeError, ValueError):  # a scalar array, but of complex numbers or dates
        pass
    if result is None:
        raise ValueError(
            f"{owner}: `{name}` must be a positive number, but is {value!r} of type "
            f"{type(value).__name__}. Pass a number such as 0.1."
        )
    if not math.isfinite(result) or result <= 0:
        raise ValueError(
            f"{owner}: `{name}` must be a finite number above 0, but is {result!r}. {CLIP_NOTHING}"
        )
    if result < _SMALLEST or not fits_float32(result):
        raise ValueError(
            f"{owner}: `{name}` must be within the range of float32, {_SMALLEST:.3g} to "
            f"{_LARGEST:.3g}, but is {result!r}. {CLIP_NOTHING}"
        )
    return result


def fits_float32(value: float) -> bool:
    """Whether `value` is finite in float32, in which limits are computed."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(value)))


def threshold(owner: str, name: str, value: object) -> Any:
    """`value` as a float, or the schedule that it is."""
    if isinstance(value, dict) and "class_name" in value:  # a schedule from a saved config
        value = made_of(owner, name, value, keras.optimizers.schedules.deserialize)
    if isinstance(value, LearningRateSchedule):
        _check_constants(owner, name, value)
        return value
    if value is None:
        raise ValueError(
            f"{owner}: `{name}` must be a positive number or a LearningRateSchedule, but is "
            "None. To clip nothing, pass `clipper=None`."
        )
    return positive(owner, name, value)


def _check_constants(owner: str, name: str, schedule: Any) -> None:
    """Raise a ValueError if a schedule is made of a number that float32 does not have."""
    try:
        config = schedule.get_config()
    except NotImplementedError:  # somebody's own, without a config
        return
    for value in keras.tree.flatten(config):
        if isinstance(value, (int, float)) and not fits_float32(value):
            raise ValueError(
                f"{owner}: the schedule of `{name}` has the constant {value!r}, which float32 "
                f"does not have. {CLIP_NOTHING}"
            )


def bounds(
    owner: str,
    name: str,
    value: float,
    *,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raise a ValueError if `value`, which is above 0, is too large."""
    if below is not None and value >= below:
        raise ValueError(
            f"{owner}: `{name}` must be between 0 and {below:g}, exclusive, but is {value!r}."
        )
    if at_most is not None and value > at_most:
        raise ValueError(
            f"{owner}: `{name}` must be above 0 and at most {at_most:g}, but is {value!r}."
        )


def choice(owner: str, name: str, value: object, allowed: tuple, note: str = "") -> Any:
    """`value` if it is one of `allowed`.

    Raises:
        ValueError: it is not; the message ends with `note`.
    """
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        words = ", ".join(repr(a) for a in allowed)
        note = f" {note}" if note else ""
        raise ValueError(f"{owner}: `{name}` must be one of {words}, but is {value!r}.{note}")
    return value


def count(owner: str, name: str, value: object) -> int:
    """`value` as an int of at least 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"{owner}: `{name}` must be a whole number of at least 1, but is {value!r}."
        )
    return int(value)


def steps(owner: str, name: str, value: object) -> int | None:
    """`value` as an int of at least 1, or None, which means off."""
    return None if value is None else count(owner, name, value)


def made_of(owner: str, name: str, value: object, make: Callable[[Any], Any]) -> Any:
    """`make(value)`, for what Keras makes of a saved config, with errors of one line.

    Raises:
        ValueError: Keras cannot make anything of it.
    """
    try:
        return make(value)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{owner}: `{name}` must be an object or its config as Keras serialises it, but "
            f"{value!r} is none ({reason})."
        ) from error


def config(
    owner: str, value: object, known: Iterable[str], needed: Iterable[str] = ()
) -> Mapping[str, Any]:
    """`value` if it is the config of an `owner`.

    Raises:
        ValueError: it is no dict, has an entry that is not `known`, or lacks one that is `needed`.
    """
    known = list(known)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{owner}: `config` must be a dict, but is {value!r}. Pass what get_config() gave."
        )
    for key in value:
        if key not in known:
            raise ValueError(
                f"{owner}: unknown parameter {key!r}{did_you_mean(str(key), known)}. There are "
                f"{', '.join(known)}."
            )
    for key in needed:
        if key not in value:
            raise ValueError(f"{owner}: `config` lacks {key!r}. Pass what get_config() gave.")
    return value
