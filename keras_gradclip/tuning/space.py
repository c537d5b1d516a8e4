"""The search space: the clipper, its thresholds, and the learning rate.

    def build_model(hp):
        values = clip_hyperparameters(hp, learning_rate=(1e-4, 1e-2))
        clipper = to_clipper(values)          # None for a trial without clipping
        ...

Clippers and their parameters come from the declarations (`searchable`). Every name belongs to one
clipper (`absolute/threshold`, `exponential/gamma` ...), in a conditional scope of KerasTuner, so
that a trial has no unused parameter.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import keras
import numpy as np

import keras_gradclip as kgc
from keras_gradclip.clippers import Parameter, parameters, selectable
from keras_gradclip.clippers import threshold_of as threshold_name
from keras_gradclip.clippers.units import units_of
from keras_gradclip.files import read_json
from keras_gradclip.names import did_you_mean, layer_of

if TYPE_CHECKING:
    import keras_tuner as kt

#: A hyper-parameter's value in a trial.
Value: TypeAlias = str | float | int | bool
#: A trial's hyper-parameters by name.
Values: TypeAlias = dict[str, Value]
NONE = "none"
#: The clippers searched by default, any of `searchable()`; five dimensions with their thresholds.
CLIPPERS = (NONE, "absolute", "exponential", "norm", "update_ratio")
# A log scale has no 0, and a threshold of 0 would stop training.
_LEAST_OF_ZERO = 1e-4


def searchable() -> dict[str, dict[str, Parameter]]:
    """The parameters that a search can vary, by name, for each registered clipper."""
    return {
        alias: {p.name: p for p in parameters(cls) if p.kind != "object"}
        for alias, cls in selectable().items()
    }


def calibrated_ranges(path: str | os.PathLike) -> dict[str, tuple[float, float]]:
    """Ranges for `clip_hyperparameters`, centred on measured thresholds.

    Args:
        path: a file of `keras_gradclip.calibrate(...).save(path)`.

    Returns:
        A dict from a threshold's name (`threshold`, `gamma`, `max_norm`, `clip_factor`,
        `rms/threshold` ...) to a range of half a decade on either side of the layers' median.
        Clippers without a threshold are omitted.

    Raises:
        ValueError: the file is not a saved calibration.
    """
    try:
        thresholds = read_json(path)["calibration"]["thresholds"]
        known = {
            alias: [x for x in of_layer.values() if x and 0 < x < math.inf]
            for alias, of_layer in thresholds.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"calibration {str(path)!r} was not written by keras_gradclip.calibrate(...).save(): "
            f"{type(error).__name__}: {error}."
        ) from error
    result: dict[str, tuple[float, float]] = {}
    names: set[str] = set()
    for alias, cls in selectable().items():
        name = threshold_name(cls)
        figures = known.get(alias, [])
        if figures and name is not None:
            centre = statistics.median(figures)
            key = f"{alias}/{name}" if name in names else name
            result[key] = (centre / math.sqrt(10), centre * math.sqrt(10))
        names.add(name or "")
    return result


def clip_hyperparameters(
    hp: kt.HyperParameters,
    clippers: Sequence[str] = CLIPPERS,
    *,
    groups: Mapping[str, str] | None = None,
    activation_gate: bool = False,
    learning_rate: tuple[float, float] | None = None,
    default_learning_rate: float | None = None,
    points: int | None = None,
    **varied: Sequence[Value | None],
) -> dict[str, Value]:
    """Declares the space on `hp` and returns the values of this trial.

    The first clipper is the default: with "none" there, a trial of default values is the
    unclipped baseline.

    Args:
        hp: `keras_tuner.HyperParameters`.
        clippers: which rules to choose from: "none" and any of `searchable()`.
        groups: a dict from name to regular expression over `variable.path`, such as
            `layer_groups(model)`: each group gets its own threshold. The first match wins;
            variables without a match are not clipped.
        activation_gate: also search whether to gate activations, and its c and γ.
        learning_rate: (low, high) on a log scale, or None to leave it out. Clipping and the
            learning rate trade off against each other: a fixed one favours a threshold.
        default_learning_rate: the default trial's; otherwise the middle of the range.
        points: the number of grid points of each number, for a grid search.
        **varied: for each parameter the range (low, high) or the words to search:
            `threshold=(0.01, 1)`, `rescale=["none", "norm"]`, `**{"rms/threshold": (0.1, 1)}`.
            Without a clipper's name it applies to every clipper that has a range or choice of that
            name. A low of 0 means 1e-4·high. By default only each clipper's threshold is searched,
            in the range that the clipper suggests.

    Returns:
        The active hyper-parameters by name, for `to_clipper` and `to_gate`.

    Raises:
        ValueError: an unknown name or word, or an empty or reversed range.
    """
    declare = _Declaration(hp, points, groups)
    known = searchable()
    clippers = _listed(clippers)
    if not clippers or any(
        clippers.count(each) > 1 or each not in (NONE, *known) for each in clippers
    ):
        raise ValueError(
            f"clip_hyperparameters: `clippers` must be some of {', '.join((NONE, *known))}, each "
            f"once, but is {clippers}."
        )
    names = sorted({n for alias, ps in known.items() for p in ps for n in (p, f"{alias}/{p}")})
    for name in varied:
        if name not in names:
            near = did_you_mean(name, names)
            raise ValueError(f"clip_hyperparameters: no clipper has a parameter {name!r}{near}.")
        own, given = name.rpartition("/")[2], varied[name]
        words = {w or NONE for ps in known.values() if own in ps for w in ps[own].choices}
        if wrong := [repr(each) for each in _listed(given) if words and each not in [*words]]:
            raise ValueError(
                f"clip_hyperparameters: `{name}` must be some of {', '.join(sorted(words))}, but "
                f"has {', '.join(wrong)}."
            )
    declare.word("clipper", clippers)
    for alias in clippers:
        if alias == NONE:
            continue
        with hp.conditional_scope("clipper", [alias]):
            for p in known[alias].values():
                # A range without a clipper's name is for parameters that are worth searching.
                shared = varied.get(p.name) if p.search or p.kind == "word" else None
                declare.parameter(alias, p, varied.get(f"{alias}/{p.name}", shared))
    if activation_gate:
        declare.keep("activation_gate", hp.Boolean("activation_gate", default=False))
        with hp.conditional_scope("activation_gate", [True]):
            declare.number("gate/clip_value", (0.01, 1.0))
            declare.number("gate/gamma", (0.01, 1.0))
    if learning_rate is not None:
        declare.number("learning_rate", learning_rate, default_learning_rate)
    return declare.values


class _Declaration:
    """Declares hyper-parameters and collects the values of active ones."""

    def __init__(
        self, hp: kt.HyperParameters, points: int | None, groups: Mapping[str, str] | None
    ) -> None:
        if not hasattr(hp, "conditional_scope"):
            raise ValueError(
                "clip_hyperparameters: `hp` must be a keras_tuner.HyperParameters, but is "
                f"{hp!r}. For an Optuna trial call `suggest`."
            )
        if points is not None and not (isinstance(points, int) and points >= 2):
            raise ValueError(f"clip_hyperparameters: `points`={points!r} must be 2 or more.")
        if groups is not None and not isinstance(groups, Mapping):
            raise ValueError(
                f"clip_hyperparameters: `groups` must be a dict from name to regular expression, "
                f"but is {groups!r}."
            )
        self.hp, self.points, self.groups = hp, points, groups
        self.values: dict[str, Value] = {}

    def keep(self, name: str, value: Value | None) -> None:
        """Collects a value; None: not active in this trial."""
        if value is not None:
            self.values[name] = value

    def parameter(self, alias: str, p: Parameter, given: Sequence[Value | None] | None) -> None:
        """Declares a clipper's parameter; by default only a threshold, in its suggested range."""
        name = f"{alias}/{p.name}"
        if given is None and not p.threshold:
            return
        if p.kind == "word":
            words = [word or NONE for word in p.choices]
            own = [word for word in _listed(given) if word in words]
            if not own:
                raise ValueError(
                    f"clip_hyperparameters: `{p.name}` {_listed(given)} holds nothing for "
                    f"{alias!r}, which takes {', '.join(words)}."
                )
            if own != [p.default or NONE]:  # `to_clipper` uses the default anyway
                self.word(name, own)
            return
        limits = given or p.range
        if limits is None:
            raise ValueError(
                f"clip_hyperparameters: {name!r} has no range of its own. Give one: "
                f"**{{{name!r}: (low, high)}}."
            )
        low, high = _bounds(name, limits)
        p.check(alias, high)
        if p.kind == "count":
            low, high = max(round(low), 1), round(high)
            self.keep(name, self.hp.Int(name, low, high, default=round((low + high) / 2)))
            return
        for each in _threshold_names(alias, p.name, self.groups) if p.threshold else [name]:
            self.number(each, limits, log=p.log)

    def word(self, name: str, words: Sequence[Value | None]) -> None:
        """Declares a choice of words, the first of them the default."""
        self.keep(name, self.hp.Choice(name, list(words), default=words[0]))

    def number(
        self, name: str, bounds: Sequence, default: float | None = None, log: bool = True
    ) -> None:
        """Declares a number; for a grid a choice of some."""
        low, high = _bounds(name, bounds)
        low = low or _LEAST_OF_ZERO * high
        default = default or (math.sqrt(low * high) if log else (low + high) / 2)
        if not low <= default <= high:
            raise ValueError(
                f"clip_hyperparameters: the default of {name!r}, {default:g}, is not within "
                f"{low:g} to {high:g}."
            )
        if self.points is None:
            sampling = "log" if log else "linear"
            self.keep(name, self.hp.Float(name, low, high, sampling=sampling, default=default))
            return
        spaced = (np.geomspace if log else np.linspace)(low, high, self.points)
        grid = [_rounded(value) for value in spaced]
        nearest = min(grid, key=lambda value: abs(value - default))
        self.keep(name, self.hp.Choice(name, grid, default=nearest, ordered=True))


def to_clipper(
    values: Mapping[str, Value], groups: Mapping[str, str] | None = None
) -> kgc.Clipper | None:
    """The clipper of a trial.

    Args:
        values: hyper-parameters by name, as `clip_hyperparameters` returns them, or
            `hp.values`; other names are ignored. Numbers are rounded to 7 digits, because
            KerasTuner sends float32 between machines.
        groups: as given to `clip_hyperparameters`.

    Returns:
        A `keras_gradclip` clipper, or None for "none".

    Raises:
        ValueError: "clipper" is missing or unknown, or a threshold is missing.
    """
    alias = _checked("to_clipper", values).get("clipper")
    if alias == NONE:
        return None
    if alias not in [*selectable()]:
        raise ValueError(
            "to_clipper: `values` must hold 'clipper', one of "
            f"{', '.join((NONE, *selectable()))}, but it is {alias!r}."
        )
    cls, known = selectable()[alias], searchable()[alias]
    threshold = threshold_name(cls)
    settings = {
        name: _value(p, values[f"{alias}/{name}"])
        for name, p in known.items()
        if name != threshold and f"{alias}/{name}" in values
    }
    made = []
    for group in groups or [""]:
        if threshold is not None:
            [name] = _threshold_names(alias, threshold, [group])
            if name not in values:
                raise ValueError(
                    f"to_clipper: `values` lack {name!r}. Pass the same `groups` as to "
                    "clip_hyperparameters."
                )
            settings[threshold] = _value(known[threshold], values[name])
        made.append(cls(**settings))
    return kgc.ClipMap(list(zip(groups.values(), made, strict=True))) if groups else made[0]


def _value(p: Parameter, value: Value) -> Value | None:
    """A trial's value in the type that the clipper expects."""
    if p.kind == "word":
        return None if value == NONE and None in p.choices else value
    return int(value) if p.kind == "count" else _rounded(value)


def to_gate(values: Mapping[str, Value], initial_learning_rate: float) -> kgc.ActivationGate | None:
    """The activation gate of a trial, or None.

    Args:
        values: as for `to_clipper`.
        initial_learning_rate: lr₀ of the gate's equation.
    """
    if not _checked("to_gate", values).get("activation_gate"):
        return None
    return kgc.ActivationGate(
        clip_value=_rounded(values["gate/clip_value"]),
        gamma=_rounded(values["gate/gamma"]),
        initial_learning_rate=initial_learning_rate,
    )


def layer_groups(model: keras.Model) -> dict[str, str]:
    """Splits a network into stem, stages and head, for `groups=`.

    The stem is the first layer with a kernel or an embedding table, and all layers up to the next
    kernel, such as its normalisation; the head is the last layer with a kernel and all after it;
    the stages are the rest.

    Args:
        model: a built Keras model.

    Returns:
        {"stem": regex, "head": regex, "stages": ".*"}, in the order of matching.

    Raises:
        ValueError: not a model, or fewer than three layers with kernels.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"layer_groups: `model` must be a built keras.Model, but is {model!r}.")
    runs: list[list[str]] = []  # each begins with a layer that has a kernel
    variables = model.trainable_variables
    for variable, unit in zip(variables, units_of(variables), strict=True):
        layer = layer_of(variable)
        if any(layer in run for run in runs):
            continue
        if unit.is_kernel or not runs:
            runs.append([layer])
        else:
            runs[-1].append(layer)
    if len(runs) < 3:
        raise ValueError(
            f"layer_groups: {model.name!r} has {len(runs)} layers with kernels; stem, stages and "
            "head take three or more. Build the model first, or give `groups` by hand."
        )
    return {"stem": _any_of(runs[0]), "head": _any_of(runs[-1]), "stages": ".*"}


def threshold_of(values: Mapping[str, Value]) -> dict[str, Value]:
    """The thresholds among a trial's values, by name; empty if unclipped."""
    alias = str(values.get("clipper"))
    cls = selectable().get(alias)
    name = None if cls is None else threshold_name(cls)
    if name is None:
        return {}
    stem = f"{alias}/{name}"
    return {n: value for n, value in values.items() if n == stem or n.startswith(f"{stem}/")}


def combinations(hp: kt.HyperParameters) -> Iterator[Values]:
    """All combinations of active values of a space, each parameter's default first.

    Args:
        hp: `keras_tuner.HyperParameters`.
    """

    def extend(values: Values, rest: Sequence) -> Iterator[Values]:
        if not rest:
            yield dict(values)
            return
        parameter, *others = rest
        hp.values = values
        if not hp.is_active(parameter):
            yield from extend(values, others)
            return
        for value in dict.fromkeys((parameter.default, *parameter.values)):
            yield from extend({**values, parameter.name: value}, others)

    yield from extend({}, hp.space)


def _threshold_names(alias: str, threshold: str, groups: Iterable[str] | None) -> list[str]:
    return [f"{alias}/{threshold}{f'/{group}' if group else ''}" for group in groups or [""]]


def _checked(owner: str, values: Mapping[str, Value]) -> Mapping[str, Value]:
    """The values of a trial; raises a ValueError if they are no dict."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{owner}: `values` must be a dict from name to value, such as `hp.values`, but is "
            f"{values!r}."
        )
    return values


def _listed(words: object) -> list:
    """A list of one or several words; None is an empty one."""
    if words is None or isinstance(words, str) or not isinstance(words, Iterable):
        return [] if words is None else [words]
    return list(words)


def _any_of(layers: Sequence[str]) -> str:
    return f"({'|'.join(re.escape(layer) for layer in layers)})/.*"


def _rounded(value: Value) -> float:
    return float(f"{value:.7g}")


def _bounds(name: str, bounds: Sequence) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in bounds)
        shown = f"{low:g} to {high:g}"
    except (TypeError, ValueError):
        low = high = math.nan
        shown = f"{bounds!r}, not (low, high)"
    if not (0 <= low < high < math.inf):
        raise ValueError(
            f"clip_hyperparameters: the range of {name!r} must be 0 <= low < high, but is {shown}."
        )
    return low, high
