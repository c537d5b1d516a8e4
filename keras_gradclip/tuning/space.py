"""The search space: which clipper, its thresholds, and the learning rate beside them.

    def build_model(hp):
        values = clip_hyperparameters(hp, learning_rate=(1e-4, 1e-2))
        clipper = to_clipper(values)          # None where the trial does not clip
        ...

Every name belongs to one clipper (`absolute/threshold`, `exponential/gamma` ...) and lies in a
conditional scope of KerasTuner, so that a trial carries no parameter that it does not use.
"""

import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras_gradclip as kgc

CLIPPERS = ("none", "absolute", "exponential", "norm")
#: The hyper-parameters that are thresholds: those that a group of layers may have of its own.
THRESHOLDS = {"absolute": "threshold", "exponential": "gamma", "norm": "max_norm"}
_RESCALES = {"absolute": ("none", "norm", "max"), "exponential": ("none", "norm", "max", "alpha")}
# A log scale has no 0, and a threshold of 0 would stop training.
_LEAST_OF_ZERO = 1e-4


def calibrated_ranges(path: str | os.PathLike) -> dict[str, tuple[float, float]]:
    """Ranges for `clip_hyperparameters`, centred on measured thresholds.

    Args:
        path: JSON that `keras_gradclip.calibrate(...).save(path)` wrote.

    Returns:
        A dict of `threshold`, `gamma` and `max_norm`: half a decade to either side of the median
        of the layers' thresholds, on a log scale. A clipper without a figure is left out.

    Raises:
        ValueError: the file is no such JSON.
    """
    try:
        found = json.loads(Path(path).read_text())["calibration"]["thresholds"]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"calibration {str(path)!r} is no file that keras_gradclip.calibrate(...).save() "
            f"wrote: {type(error).__name__}: {error}."
        ) from error
    ranges = {}
    kinds = {"absolute": "threshold", "exponential": "gamma", "norm": "max_norm"}
    for kind, name in kinds.items():
        figures = [x for x in found.get(kind, {}).values() if x and math.isfinite(x) and x > 0]
        if figures:
            centre = statistics.median(figures)
            ranges[name] = (centre / math.sqrt(10), centre * math.sqrt(10))
    return ranges


def clip_hyperparameters(
    hp,
    clippers: Sequence[str] = CLIPPERS,
    threshold: tuple[float, float] = (0.01, 0.1),
    gamma: tuple[float, float] = (0.01, 0.1),
    beta: tuple[float, float] = (0.5, 1.0),
    max_norm: tuple[float, float] = (0.1, 10.0),
    rescale: Sequence[str] = ("none", "norm", "max", "alpha"),
    weight: Sequence[str] = ("elementwise", "rms", "none"),
    scope: Sequence[str] = ("layer",),
    groups: Mapping[str, str] | None = None,
    activation_gate: bool = False,
    learning_rate: tuple[float, float] | None = None,
    default_learning_rate: float | None = None,
    points: int | None = None,
) -> dict:
    """Declares the space on `hp` and returns the values of this trial.

    The first clipper is the default: with "none" there, a trial of default values is the
    unclipped baseline.

    Args:
        hp: `keras_tuner.HyperParameters`.
        clippers: which rules to choose from; any of "none", "absolute", "exponential", "norm".
        threshold: of "absolute", c, as (low, high), on a log scale. A low of 0 means 1e-4·high:
            (0, 1) is the whole range of the method.
        gamma: of "exponential", γ, as `threshold`.
        beta: of "exponential", β, as (low, high), on a linear scale.
        max_norm: of "norm", as `threshold`.
        rescale: "none", "norm", "max", "alpha" (which "exponential" alone takes).
        weight: of "exponential": "elementwise", "rms", "none".
        scope: of "norm": "layer", "variable", "global".
        groups: name to regular expression over `variable.path`, such as `layer_groups(model)`
            gives: the threshold is then searched for each group by itself. The first match wins;
            what no expression matches is not clipped.
        activation_gate: also search whether to gate activations, and its c and γ.
        learning_rate: (low, high) on a log scale, or None to leave it out. Clipping and the
            learning rate trade off against each other: a fixed one favours a threshold.
        default_learning_rate: that of the default trial; else the middle of the range.
        points: search each number on a grid of so many points (for a grid search).

    Returns:
        A dict of the active hyper-parameters by name, for `to_clipper` and `to_gate`.

    Raises:
        ValueError: an unknown word or an empty or reversed range.
    """
    declare = _Declaration(hp, points)
    _check_words("clippers", clippers, CLIPPERS)
    _check_words("rescale", rescale, _RESCALES["exponential"])
    _check_words("weight", weight, ("elementwise", "rms", "none"))
    _check_words("scope", scope, ("layer", "variable", "global"))
    ranges = {"absolute": threshold, "exponential": gamma, "norm": max_norm}
    names = _threshold_names(groups)

    declare.word("clipper", clippers)
    for kind in clippers:
        if kind == "none":
            continue
        with hp.conditional_scope("clipper", [kind]):
            for name in names[kind]:
                declare.log(name, ranges[kind])
            if kind == "exponential":
                declare.linear("exponential/beta", beta)
                declare.word("exponential/weight", weight, "elementwise")
            if kind == "norm":
                declare.word("norm/scope", scope, "layer")
            else:
                own = [word for word in rescale if word in _RESCALES[kind]]
                if not own:
                    raise ValueError(
                        f"clip_hyperparameters: `rescale` {list(rescale)} holds nothing for "
                        f"{kind!r}, which takes {', '.join(_RESCALES[kind])}."
                    )
                declare.word(f"{kind}/rescale", own, "none")
    if activation_gate:
        declare.flag("activation_gate")
        with hp.conditional_scope("activation_gate", [True]):
            declare.log("gate/clip_value", (0.01, 1.0))
            declare.log("gate/gamma", (0.01, 1.0))
    if learning_rate is not None:
        declare.log("learning_rate", learning_rate, default_learning_rate)
    return declare.values


class _Declaration:
    """Declares hyper-parameters and remembers the values of those that are active."""

    def __init__(self, hp, points):
        if points is not None and points < 2:
            raise ValueError(f"clip_hyperparameters: `points`={points!r} must be 2 or more.")
        self.hp, self.points, self.values = hp, points, {}

    def _keep(self, name, value):
        if value is not None:  # None: not active in this trial
            self.values[name] = value

    def word(self, name, words, usual=None):
        if list(words) == [usual]:
            return  # no choice, and what `to_clipper` takes anyway
        self._keep(name, self.hp.Choice(name, list(words), default=words[0]))

    def flag(self, name):
        self._keep(name, self.hp.Boolean(name, default=False))

    def log(self, name, bounds, default=None):
        low, high = _bounds(name, bounds)
        if low == 0:
            low = _LEAST_OF_ZERO * high
        self._number(name, low, high, default or math.sqrt(low * high), "log")

    def linear(self, name, bounds):
        low, high = _bounds(name, bounds)
        self._number(name, low, high, (low + high) / 2, "linear")

    def _number(self, name, low, high, default, sampling):
        if not low <= default <= high:
            raise ValueError(
                f"clip_hyperparameters: the default of {name!r}, {default:g}, is not within "
                f"{low:g} to {high:g}."
            )
        if self.points is None:
            value = self.hp.Float(name, low, high, sampling=sampling, default=default)
        else:
            shares = [i / (self.points - 1) for i in range(self.points)]
            if sampling == "log":
                grid = [low * (high / low) ** share for share in shares]
            else:
                grid = [low + (high - low) * share for share in shares]
            grid = [_rounded(value) for value in grid]
            nearest = min(grid, key=lambda value: abs(value - default))
            value = self.hp.Choice(name, grid, default=nearest, ordered=True)
        self._keep(name, value)


def to_clipper(values: Mapping, groups: Mapping[str, str] | None = None):
    """The clipper of a trial.

    Args:
        values: hyper-parameters by name, as `clip_hyperparameters` returns them, or
            `hp.values`; other names are ignored. Numbers count to 7 digits, which is what
            KerasTuner's messages between machines (float32) keep.
        groups: as given to `clip_hyperparameters`.

    Returns:
        A `keras_gradclip` clipper, or None for "none".

    Raises:
        ValueError: no "clipper" among the values, an unknown one, or a missing threshold.
    """
    kind = values.get("clipper")
    if kind == "none":
        return None
    if kind not in THRESHOLDS:
        raise ValueError(
            f"to_clipper: `values` must hold 'clipper', one of {', '.join(CLIPPERS)}, but it is "
            f"{kind!r}."
        )
    names = _threshold_names(groups)[kind]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"to_clipper: `values` lack {missing[0]!r}. Pass the same `groups` as to "
            "clip_hyperparameters."
        )
    made = [_one_clipper(kind, _rounded(values[name]), values) for name in names]
    if not groups:
        return made[0]
    return kgc.ClipMap(list(zip(groups.values(), made, strict=True)))


def from_clipper(clipper, groups: Mapping[str, str] | None = None) -> dict:
    """The hyper-parameters of a clipper: the inverse of `to_clipper`.

    Args:
        clipper: None, an absolute, exponential or norm clipper, or a ClipMap of one kind over
            `groups`.
        groups: name to regular expression; needed for a ClipMap.

    Raises:
        ValueError: a clipper outside of the space, such as a Chain or one with a schedule.
    """
    if clipper is None:
        return {"clipper": "none"}
    if not isinstance(clipper, kgc.ClipMap):
        if groups:
            raise ValueError(f"from_clipper: {clipper} has no groups: leave out `groups`.")
        return _values_of(clipper, "")
    rules = dict(clipper.rules)
    if not groups or list(rules) != list(groups.values()) or clipper.default is not None:
        raise ValueError(
            f"from_clipper: the rules {list(rules)} are not those of `groups`, "
            f"{list((groups or {}).values())}."
        )
    values: dict = {}
    for group, pattern in groups.items():
        own = _values_of(rules[pattern], f"/{group}")
        clash = [name for name in values if name in own and values[name] != own[name]]
        if clash:
            raise ValueError(f"from_clipper: the groups differ in {clash[0]!r}, not in thresholds.")
        values |= own
    return values


def to_gate(values: Mapping, initial_learning_rate: float):
    """The activation gate of a trial, or None.

    Args:
        values: as for `to_clipper`.
        initial_learning_rate: lr₀ of the gate's equation.
    """
    if not values.get("activation_gate"):
        return None
    return kgc.ActivationGate(
        clip_value=_rounded(values["gate/clip_value"]),
        gamma=_rounded(values["gate/gamma"]),
        initial_learning_rate=initial_learning_rate,
    )


def layer_groups(model) -> dict[str, str]:
    """Splits a network into stem, stages and head, for `groups=`.

    The stem is the first layer with a kernel (a weight of two axes or more) and what follows it
    up to the next kernel, as its normalisation; the head is the last layer with a kernel and what
    follows; the stages are the rest.

    Args:
        model: a built Keras model.

    Returns:
        {"stem": regex, "head": regex, "stages": ".*"}, in the order in which they are tried.

    Raises:
        ValueError: fewer than three layers with kernels.
    """
    runs: list[list[str]] = []  # each begins with a layer that has a kernel
    for variable in model.trainable_variables:
        layer = variable.path.rpartition("/")[0]
        if any(layer in run for run in runs):
            continue
        if len(variable.shape) >= 2 or not runs:
            runs.append([layer])
        else:
            runs[-1].append(layer)
    if len(runs) < 3:
        raise ValueError(
            f"layer_groups: {model.name!r} has {len(runs)} layers with kernels; stem, stages and "
            "head take three or more. Give `groups` by hand."
        )
    return {"stem": _any_of(runs[0]), "head": _any_of(runs[-1]), "stages": ".*"}


def threshold_of(values: Mapping) -> dict[str, float]:
    """The thresholds among a trial's values, by name; empty for the unclipped trial."""
    kind = values.get("clipper")
    if kind not in THRESHOLDS:
        return {}
    stem = f"{kind}/{THRESHOLDS[kind]}"
    return {
        name: value for name, value in values.items() if name == stem or name.startswith(f"{stem}/")
    }


def ranges(hp) -> dict[str, tuple[float, float]]:
    """(low, high) of the numbers of a space, by name.

    Args:
        hp: `keras_tuner.HyperParameters`.
    """
    found = {}
    for parameter in hp.space:
        config = parameter.get_config()
        numbers = [config.get("min_value"), config.get("max_value")]
        if "values" in config:
            numbers = [v for v in config["values"] if isinstance(v, float)]
        if numbers and all(isinstance(v, (int, float)) for v in numbers):
            found[parameter.name] = (min(numbers), max(numbers))
    return found


def _one_clipper(kind, threshold, values):
    rescale = values.get(f"{kind}/rescale", "none")
    rescale = None if rescale == "none" else rescale
    if kind == "absolute":
        return kgc.AbsoluteClip(threshold, rescale=rescale)
    if kind == "norm":
        return kgc.NormClip(threshold, scope=values.get("norm/scope", "layer"))
    return kgc.ExponentialClip(
        beta=_rounded(values["exponential/beta"]),
        gamma=threshold,
        weight=values.get("exponential/weight", "elementwise"),
        rescale=rescale,
    )


def _values_of(clipper, suffix):
    kinds = {kgc.AbsoluteClip: "absolute", kgc.ExponentialClip: "exponential", kgc.NormClip: "norm"}
    kind = kinds.get(type(clipper))
    numbers = dict(clipper.hyperparameters()) if kind else {}
    if kind is None or not all(isinstance(value, float) for value in numbers.values()):
        raise ValueError(
            f"from_clipper: {clipper} is outside of the space: use an absolute, exponential or "
            "norm clipper with plain numbers."
        )
    values = {"clipper": kind, f"{kind}/{THRESHOLDS[kind]}{suffix}": numbers[THRESHOLDS[kind]]}
    if kind == "norm":
        return values | {"norm/scope": clipper.scope}
    if kind == "exponential":
        values |= {"exponential/beta": clipper.beta, "exponential/weight": clipper.weight}
    return values | {f"{kind}/rescale": clipper.rescale or "none"}


def _threshold_names(groups) -> dict[str, list[str]]:
    suffixes = [f"/{group}" for group in groups] if groups else [""]
    return {
        kind: [f"{kind}/{name}{suffix}" for suffix in suffixes] for kind, name in THRESHOLDS.items()
    }


def _any_of(layers) -> str:
    return f"({'|'.join(re.escape(layer) for layer in layers)})/.*"


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def _bounds(name, bounds):
    low, high = (float(bound) for bound in bounds)
    if not (0 <= low < high < math.inf):
        raise ValueError(
            f"clip_hyperparameters: the range of {name!r} must be 0 <= low < high, but is "
            f"{low:g} to {high:g}."
        )
    return low, high


def _check_words(argument, words, known):
    words = [words] if isinstance(words, str) else list(words)
    wrong = [word for word in words if word not in known]
    if wrong or not words or len(set(words)) < len(words):
        raise ValueError(
            f"clip_hyperparameters: `{argument}` must be some of {', '.join(known)}, each once, "
            f"but is {words}."
        )
