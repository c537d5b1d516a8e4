"""The base class of all clippers, and the registry that finds them by name.

A clipper is a frozen dataclass that defines its limit. `enforce` does the rest: it takes norms,
clips, rescales and counts.

To write one, subclass `Clipper` under `@register("its_name")`, declare the fields with `parameter`,
set `scope`, and return the largest allowed norm (or element) from `limit(weight, hyper)`. Flags,
search spaces and the table in the docs then include it; set `measures` for `calibrate`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import keras
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _validation as validation
from keras_gradclip._types import Config, Gradient, Hyper, State, Tensor, Threshold
from keras_gradclip.clippers.enforce import Assignment, ClipStats, Enforcer, Limit
from keras_gradclip.declarations import MEASURES, Card, parameters
from keras_gradclip.names import path_of


@dataclasses.dataclass(frozen=True)
class Clipper(Limit):
    """Base class of all clippers: see the module's docstring for how to write one.

    A clipper with memory implements `memory` and `limits` instead of `limit`. One that is not a
    limit overrides `apply` (and `init`).
    """

    #: Live fields of a clipper that does not use `parameter`.
    live: ClassVar[tuple[str, ...]] = ()
    #: The row in the table of the docs.
    card: ClassVar[Card | None] = None
    #: The figure that `calibrate` measures for the threshold, a key of `MEASURES`; or None.
    measures: ClassVar[str | None] = None
    #: Whether flags and search spaces can create it: False for composites.
    selectable: ClassVar[bool] = True
    #: Whether it has rules by path, each of which must match a variable.
    has_rules: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for declared in parameters(self):
            value = declared.check(type(self).__name__, getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)

    # Interface ---------------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Threshold]:
        """The live hyper-parameters: name to float or LearningRateSchedule."""
        return {p.name: getattr(self, p.name) for p in parameters(self) if p.live}

    def with_hyperparameters(self, values: Mapping[str, Threshold]) -> Clipper:
        """A copy with other values; `values` is keyed as `hyperparameters()` is."""
        return dataclasses.replace(self, **dict(values))

    def check_variables(self, variables: Sequence[keras.Variable]) -> None:
        """Raises a ValueError if this clipper cannot be used with these variables."""
        for variable in variables:
            is_trained = getattr(variable, "trainable", True)
            if is_trained and "complex" in str(getattr(variable, "dtype", "")):
                raise ValueError(
                    f"{type(self).__name__}: {path_of(variable)!r} is of dtype {variable.dtype}, "
                    "and clipping a complex gradient is not defined. Exclude it: "
                    f"ClipMap({{{path_of(variable)!r}: None}}, default=...)."
                )

    def assignments(
        self, variables: Sequence[keras.Variable], inherited: bool = False
    ) -> list[Assignment]:
        """The clippers and the variables that each limits, in the order of clipping.

        `inherited`: those that `super().apply` in an override of `apply` enforces.
        """
        has_own = type(self).apply is not Clipper.apply and not inherited
        return [Assignment("", self, tuple(range(len(variables))), has_own)]

    def _enforcer(self, variables: Sequence[keras.Variable]) -> Enforcer:
        return Enforcer(self.assignments(variables, inherited=True), variables)

    def init(self, variables: Sequence[keras.Variable]) -> dict[str, object]:
        """The running state before the first update: name to NumPy array."""
        return self._enforcer(variables).state

    def apply(
        self,
        grads: Sequence[Gradient],
        variables: Sequence[keras.Variable],
        state: State,
        hyper: Hyper,
    ) -> tuple[list[Gradient], State, ClipStats]:
        """Clips gradients, for loops that keep the state themselves.

        Args:
            grads: one gradient per variable, of the variable's shape, any float dtype; None and
                `tf.IndexedSlices` without duplicate rows are allowed.
            variables: the variables, in the order of `init`.
            state: the state from `init` or the last `apply`.
            hyper: the values of `hyperparameters()` at this update, as float32 scalars, and
                "learning_rate" (1 if missing: the gradient is the update).

        Returns:
            The clipped gradients (same dtypes), the new state, and a `ClipStats`.
        """
        values = {name: ops.convert_to_tensor(value, "float32") for name, value in hyper.items()}
        return self._enforcer(variables).clip(grads, state, values)

    def __call__(
        self, grads: Sequence[Gradient], variables: Sequence[keras.Variable]
    ) -> list[Gradient]:
        """The clipped gradients, from a fresh state and with schedules at step 0.

        Args:
            grads: one gradient per variable (None and `tf.IndexedSlices` allowed).
            variables: the variables, in the same order.

        Raises:
            ValueError: the two lists differ in length, or a rule does not fit the variables.
        """
        if not all(isinstance(x, (list, tuple)) for x in (grads, variables)):
            raise ValueError(
                f"{type(self).__name__}: `grads` and `variables` must be lists, but are of types "
                f"{type(grads).__name__} and {type(variables).__name__}. Write "
                "clipper([gradient], [variable]) for one."
            )
        if len(grads) != len(variables):
            raise ValueError(
                f"{type(self).__name__}: `grads` and `variables` must match one to one, but "
                f"there are {len(grads)} gradients and {len(variables)} variables."
            )
        for gradient, variable in zip(grads, variables, strict=True):
            is_swapped = isinstance(gradient, keras.Variable) > isinstance(variable, keras.Variable)
            if is_swapped or not _may_be_of(gradient, variable):
                raise ValueError(
                    f"{type(self).__name__}: each of `grads` must have the shape of its variable, "
                    f"but {gradient!r} came for {variable!r}. Write clipper(grads, variables)."
                )
        self.check_variables(variables)
        merged = [arithmetic.merge_duplicate_rows(g) for g in grads]
        hyper = {k: current_value(v, 0) for k, v in self.hyperparameters().items()}
        return self.apply(merged, variables, self.init(variables), hyper)[0]

    def get_config(self) -> Config:
        """The JSON-able fields; `from_config` is the inverse."""
        return {
            f.name: serialize_value(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.init
        }

    @classmethod
    def from_config(cls, config: Config) -> Clipper:
        """The clipper of a config."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        config = validation.config(cls.__name__, config, known)
        return cls(**{k: deserialize_value(v, cls.__name__, k) for k, v in config.items()})

    def rule_of(self, variables: Sequence[keras.Variable]) -> list[tuple[str, Clipper | None]]:
        """The name of the rule and the clipper that apply to each variable."""
        return [("*", self)] * len(variables)

    def describe(self, model: keras.Model | Sequence[keras.Variable]) -> str:
        """A table of the rule and clipper of each variable, with remarks on unexpected ones.

        Args:
            model: a built `keras.Model`, or a list of variables.

        Returns:
            Text: one line per trainable variable, with its path, shape, rule and clipper.
        """
        variables = getattr(model, "trainable_variables", model)
        if not isinstance(variables, (list, tuple)):
            raise ValueError(
                f"describe: `model` must be a built model or a list of variables, not {model!r}."
            )
        variables = list(variables)
        if not variables:
            raise ValueError(
                "describe: `model` has no trainable variables. Build it first, e.g. by calling "
                "it on a batch."
            )
        self.check_variables([*getattr(model, "variables", variables)])  # frozen ones have rules
        rows = [("variable", "shape", "rule", "clipper")]
        rules, remarks = self.rule_of(variables), self._enforcer(variables).remarks()
        for variable, (rule, clipper), remark in zip(variables, rules, remarks, strict=True):
            shape = "×".join(str(d) for d in variable.shape) or "scalar"
            text = "off" if clipper is None else str(clipper)
            rows.append((path_of(variable), shape, rule, f"{text}  ({remark})" if remark else text))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __str__(self) -> str:
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:
                parts.append(f"{f.name}={shown(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _may_be_of(gradient: Gradient, variable: keras.Variable) -> bool:
    """Whether a gradient may have the shape of `variable`; one of a trace may be unknown."""
    if not hasattr(variable, "shape"):
        return False
    known = gradient is None or arithmetic.is_sparse(gradient)
    shape = variable.shape if known else ops.convert_to_tensor(gradient).shape
    if getattr(shape, "rank", 0) is None:
        return True
    pairs = zip(shape, variable.shape, strict=False)
    return len(shape) == len(variable.shape) and all(a in (None, b) for a, b in pairs)


def shown(value: object) -> str:
    """A hyper-parameter as text: `0.1`, `ExponentialDecay(0.1, 1000, 0.9)`."""
    if validation.is_schedule(value):
        return _shown_schedule(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown_schedule(schedule: keras.optimizers.schedules.LearningRateSchedule) -> str:
    """A schedule's class and its arguments, without defaults."""
    owner = type(schedule)
    try:
        config = schedule.get_config()
    except NotImplementedError:  # a custom schedule without a config
        return owner.__name__
    parts = []
    in_order = True
    for name, parameter in inspect.signature(owner).parameters.items():
        if name not in config or name == "name" or config[name] == parameter.default:
            in_order = False  # further arguments by name
            continue
        value = shown(config[name])
        by_place = in_order and parameter.default is parameter.empty
        parts.append(value if by_place else f"{name}={value}")
    return f"{owner.__name__}({', '.join(parts)})"


def current_value(value: object, iterations: keras.Variable | int) -> Tensor:
    """The value of a hyper-parameter (a number or a schedule) at a step, a float32 scalar.

    Values of a schedule are limited to positive float32 numbers, because a negative threshold would
    reverse gradients.
    """
    if callable(value):
        value = ops.cast(value(iterations), "float32")
        value = ops.clip(value, arithmetic.TINY, arithmetic.LARGEST)
    return ops.cast(arithmetic.read(value), "float32")


def serialize_value(value: object) -> object:
    if isinstance(value, Clipper) or validation.is_schedule(value):
        return keras.saving.serialize_keras_object(value)
    return value


def deserialize_value(value: object, owner: str, name: str) -> object:
    if isinstance(value, Mapping) and "class_name" in value:
        return validation.made_of(owner, name, dict(value), keras.saving.deserialize_keras_object)
    return value


#: Alias to class, filled by `register`, read by `get`.
ALIASES: dict[str, type[Clipper]] = {}


def register(alias: str) -> Callable[[type[Clipper]], type[Clipper]]:
    """Class decorator: registers a clipper for `get` and for Keras's serialisation."""

    def decorate(cls: type[Clipper]) -> type[Clipper]:
        if cls.measures is not None:
            validation.choice(cls.__name__, "measures", cls.measures, tuple(MEASURES))
        ALIASES[alias] = cls
        cls.__setattr__ = _refuse_assignment  # type: ignore[assignment, method-assign]
        return keras.saving.register_keras_serializable(package="keras_gradclip")(cls)

    return decorate


def _refuse_assignment(self: Clipper, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(
        f"{type(self).__name__}: `{name}` cannot be set to {value!r}: a clipper does not change. "
        f'In the middle of training write optimizer.clip_hyperparameters["{name}"] = ...; else '
        f"dataclasses.replace(clipper, {name}=...)."
    )


def selectable() -> dict[str, type[Clipper]]:
    """The registered clippers that flags and search spaces can create: alias to class."""
    return {alias: cls for alias, cls in ALIASES.items() if cls.selectable}


def threshold_of(cls: type[Clipper]) -> str | None:
    """The name of a clipper's threshold parameter."""
    return next((p.name for p in parameters(cls) if p.threshold), None)


def get(identifier: object) -> Clipper | None:
    """A clipper from a name, a config or a clipper, as in `keras.optimizers.get`.

    Args:
        identifier: None (off), a clipper, a name ("absolute", "exponential", "norm", or a class
            name), or a config dict of `serialize`, such as `{"class_name": "absolute",
            "config": {"threshold": 0.05}}`.

    Returns:
        The clipper, or None.

    Raises:
        ValueError: an unknown name, or an invalid config.
    """
    if identifier is None or isinstance(identifier, Clipper):
        return identifier
    config = dict(identifier) if isinstance(identifier, Mapping) else None
    name = identifier if config is None else config.get("class_name")
    if not isinstance(name, str):
        raise ValueError(
            "get: a clipper, its name, or a config with the name as 'class_name' was expected, but "
            f"{identifier!r} came. Try AbsoluteClip(0.1); for rules by path write ClipMap({{...}})."
        )
    cls = _find(name)
    if cls is not None:
        try:
            return cls() if config is None else cls.from_config(config.get("config") or {})
        except (TypeError, KeyError) as error:
            raise ValueError(f"get: the config of {name!r} does not fit: {error}.") from error
    result, reason = None, None
    if config is not None:  # registered through Keras by other code
        try:
            result = keras.saving.deserialize_keras_object(config)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            reason = error
    if not isinstance(result, Clipper):
        near = validation.did_you_mean(name.lower(), ALIASES)
        raise ValueError(
            f"get: no clipper is called {name!r}{near}; known are {sorted(ALIASES)}."
        ) from reason
    return result


def serialize(clipper: Clipper | None) -> Config | None:
    """A JSON-able dict from which `get` restores the clipper; None for None."""
    if clipper is None:
        return None
    if not isinstance(clipper, Clipper):
        raise ValueError(f"serialize: a clipper was expected, but {clipper!r} came.")
    # Try JSON now, so that an unsavable value is reported before a run.
    return json.loads(json.dumps(keras.saving.serialize_keras_object(clipper)))


def _find(name: str) -> type[Clipper] | None:
    plain = name.rpartition(">")[2]
    for alias, cls in ALIASES.items():
        if plain in (alias, cls.__name__) or plain.lower() == alias:
            return cls
    return None


def as_clipper(owner: str, name: str, value: object, *, optional: bool) -> Clipper | None:
    """A clipper from any `value` that `get` accepts; None for off.

    Raises:
        ValueError: `get` does not accept the value.
    """
    if value is None and not optional:
        raise ValueError(
            f"{owner}: `{name}` must be a clipper such as AbsoluteClip(0.1), not None."
        )
    try:
        return get(value)
    except ValueError as error:
        raise ValueError(f"{owner}: `{name}` is no clipper. {error}") from error
