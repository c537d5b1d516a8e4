"""Checks of arguments that end in an error naming the argument, the value and the remedy.

Without Keras at the top: command lines check their flags before they wait for it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

#: Of float32: normal numbers, for TensorFlow and XLA take smaller ones for 0.
_SMALLEST = 2.0**-126
_LARGEST = 2.0**128 - 2.0**104
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
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return False


def is_schedule(value: object) -> TypeGuard[Any]:
    """Whether `value` is a `keras.optimizers.schedules.LearningRateSchedule`."""
    if "keras" not in sys.modules:  # then nothing is one
        return False
    import keras

    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`", did you mean 'absolute'?"`, or `""` where none of `words` comes near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def threshold(owner: str, name: str, value: object) -> Any:
    """`value` as a float, or the schedule that it is."""
    if isinstance(value, dict) and "class_name" in value:  # a schedule from a saved config
        import keras

        value = made_of(owner, name, value, keras.optimizers.schedules.deserialize)
    if is_schedule(value):
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
    import keras

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
) -> dict[str, Any]:
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
    return dict(value)
