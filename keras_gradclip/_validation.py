"""Checks of arguments, whose errors name the argument, the value and the remedy.

Imports Keras only where needed, so that command lines can check flags without it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

#: The normal numbers of float32; TensorFlow and XLA treat smaller ones as 0.
_SMALLEST = 2.0**-126
_LARGEST = 2.0**128 - 2.0**104
CLIP_NOTHING = "To clip nothing, pass `clipper=None` (or None as the rule of a ClipMap)."


def positive(
    owner: str,
    name: str,
    value: object,
    *,
    below: float | None = None,
    at_most: float | None = None,
    advice: str = "",
) -> float:
    """`value` as a float.

    Raises:
        ValueError: `value` is not a finite number above 0, is outside the range of float32, or
            exceeds the upper bound `below` (exclusive) or `at_most` (inclusive). `advice`
            says how to turn the matter off.
    """
    advice = f". {advice}" if advice else "."
    is_number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    result = None
    try:
        if is_number and not isinstance(value, bool):
            result = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond every float
        result = math.inf
    except (TypeError, ValueError):  # a scalar array of complex numbers or dates
        pass
    if result is None:
        raise ValueError(
            f"{owner}: `{name}` must be a positive number, but is {value!r} of type "
            f"{type(value).__name__}. Pass a number."
        )
    if not math.isfinite(result) or result <= 0:
        raise ValueError(
            f"{owner}: `{name}` must be a finite number above 0, but is {result!r}{advice}"
        )
    if result < _SMALLEST or not fits_float32(result):
        raise ValueError(
            f"{owner}: `{name}` must be within the range of float32, {_SMALLEST:.3g} to "
            f"{_LARGEST:.3g}, but is {result!r}{advice}"
        )
    if below is not None and result >= below:
        raise ValueError(
            f"{owner}: `{name}` must be between 0 and {below:g}, exclusive, but is {result!r}."
        )
    if at_most is not None and result > at_most:
        raise ValueError(
            f"{owner}: `{name}` must be above 0 and at most {at_most:g}, but is {result!r}."
        )
    return result


def fits_float32(value: float) -> bool:
    """Whether `value` is finite in float32, the dtype of limits."""
    try:
        return math.isfinite(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return False


def is_schedule(value: object) -> TypeGuard[Any]:
    """Whether `value` is a `keras.optimizers.schedules.LearningRateSchedule`."""
    if "keras" not in sys.modules:  # then no schedule exists
        return False
    import keras

    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A phrase such as `", did you mean 'absolute'?"`; empty if none of `words` is similar."""
    plain = {each.lstrip("-"): each for each in words}  # all flags have the dashes in common
    close = difflib.get_close_matches(word.lstrip("-"), plain, n=1)
    return f", did you mean {plain[close[0]]!r}?" if close else ""


def threshold(owner: str, name: str, value: object, **bounds: float | None) -> Any:
    """`value` as a float (see `positive`), or as a schedule."""
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
    return positive(owner, name, value, advice=CLIP_NOTHING, **bounds)


def _check_constants(owner: str, name: str, schedule: Any) -> None:
    """Raises a ValueError if a constant of a schedule is not finite in float32."""
    try:
        config = schedule.get_config()
    except NotImplementedError:  # a custom schedule
        return
    import keras

    for value in keras.tree.flatten(config):
        if isinstance(value, (int, float)) and not fits_float32(value):
            raise ValueError(
                f"{owner}: the schedule of `{name}` has the constant {value!r}, which float32 "
                f"does not have. {CLIP_NOTHING}"
            )


def choice(owner: str, name: str, value: object, allowed: tuple, note: str = "") -> Any:
    """Returns `value`, or raises a ValueError that ends with `note` if it is not in `allowed`."""
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        words = ", ".join(repr(a) for a in allowed)
        note = f" {note}" if note else ""
        raise ValueError(f"{owner}: `{name}` must be one of {words}, but is {value!r}.{note}")
    return value


def count(owner: str, name: str, value: object) -> int:
    """`value` as an int; raises a ValueError if it is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"{owner}: `{name}` must be a whole number of at least 1, but is {value!r}."
        )
    return int(value)


def steps(owner: str, name: str, value: object) -> int | None:
    """`value` as an int of at least 1; None, which means off, as it is."""
    return None if value is None else count(owner, name, value)


def made_of(owner: str, name: str, value: object, make: Callable[[Any], Any]) -> Any:
    """`make(value)`, a function of Keras, with a ValueError in one line if that fails."""
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
    """A copy of a config; raises a ValueError for an unknown or missing key."""
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
