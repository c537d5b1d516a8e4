"""What a clipper is, and how one is found by name.

Clippers are frozen dataclasses that know nothing of optimizers or strategies. Their fields are
their hyper-parameters. `init(variables)` gives a clipper's running state, and
`apply(grads, variables, state, hyper)` clips; both are pure. Calling a clipper,
`clipper(grads, variables)`, does the two in a row for loops and tests.

To write one: subclass `Clipper` as a frozen dataclass under `@register("its_name")`, declare its
fields by `parameter`, and implement `apply` (and `init`, if it remembers something). Flags, search
spaces and the table in the docs then have it; `measures` gives it to `calibrate` as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import keras
from keras import ops

from keras_gradclip import _kernels as kernels
from keras_gradclip import _validation as validation
from keras_gradclip._names import path_of, size_of
from keras_gradclip._types import (
    Config,
    Gradient,
    Hyper,
    Model,
    Scalar,
    State,
    Tensor,
    Threshold,
    Variable,
)
from keras_gradclip.clippers._declaration import MEASURES, Card, parameters

#: The key of `hyper` under which a clipper finds the optimizer's learning rate.
LEARNING_RATE = "learning_rate"
#: The key of `hyper` that says whether this rate is a variable, to be set, or follows a schedule.
RATE_IS_SET = "rate_is_set"
#: The key of `hyper` that says which of two passes this is, where an update has two: `GRADIENTS`,
#: then `STEPS`, by which the inner optimizer is about to change the weights.
PASS = "pass"
GRADIENTS, STEPS = "gradients", "steps"


class ClipStats(NamedTuple):
    """What a clip did, one entry a variable, in the order of the variables.

    Attributes:
        fractions: a function that returns a list of float32 scalars in 0..1, the share of the
            variable's elements (or of its norms) that were clipped; None where no rule applies.
            A function, because nobody should pay for figures that nobody reads.
        weights: a list of floats, how much each variable counts in the overall fraction: its
            number of elements, or its share of a norm.
        unit: "elements" or "norms", what was counted.
        square_norms: a list of float32 scalars, the squared L2 norm before the clip, where the
            clipper had to take it anyway; else None.
    """

    fractions: Callable[[], list[Tensor]]
    weights: list[float]
    unit: str
    square_norms: list[Tensor] | None = None


def combined(stats: Sequence[ClipStats], variables: Sequence[Variable]) -> ClipStats:
    """What several clips of the same variables, one after the other, did together."""

    def fractions():
        per_clipper = [s.fractions() for s in stats]
        result = []
        for of_variable in zip(*per_clipper, strict=True):
            known = [f for f in of_variable if f is not None]
            largest = known[0] if known else None
            for f in known[1:]:
                largest = ops.maximum(largest, f)
            result.append(largest)
        return result

    unit, weights = _common_unit(stats, variables)
    return ClipStats(fractions, weights, unit, stats[0].square_norms)


def _common_unit(
    stats: Sequence[ClipStats], variables: Sequence[Variable]
) -> tuple[str, list[float]]:
    """The unit and the weights of stats that speak of the same variables."""
    if len({s.unit for s in stats}) == 1:
        return stats[0].unit, [
            max(of_variable) for of_variable in zip(*(s.weights for s in stats), strict=True)
        ]
    counted = [any(of_variable) for of_variable in zip(*(s.weights for s in stats), strict=True)]
    return "elements", [
        float(size_of(v)) if c else 0.0 for v, c in zip(variables, counted, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Clipper:
    """Base class of all clippers."""

    #: Live fields of a clipper that declares none by `parameter`.
    live: ClassVar[tuple[str, ...]] = ()
    #: The row in the table of the docs.
    card: ClassVar[Card | None] = None
    #: What `calibrate` measures to suggest the threshold, a key of `MEASURES`; None: nothing.
    measures: ClassVar[str | None] = None
    #: Whether flags and search spaces can make one: False for what is made of other clippers.
    selectable: ClassVar[bool] = True
    #: Whether `apply` wants `hyper["learning_rate"]`, the optimizer's at this step.
    needs_learning_rate: ClassVar[bool] = False
    #: Whether it bounds steps, η·g. Where the inner optimizer ignores a gradient's scale, `apply`
    #: gets the steps themselves in the place of the gradients, and a learning rate of 1.
    bounds_steps: ClassVar[bool] = False
    #: Whether it multiplies each variable's gradient by one number.
    keeps_direction: ClassVar[bool] = False
    #: Whether `apply` asks `hyper[LATER]` which clips may wait for the update: see `_deferred`.
    defers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for declared in parameters(self):
            value = declared.check(type(self).__name__, getattr(self, declared.name))
            object.__setattr__(self, declared.name, value)

    def hyperparameters(self) -> Config:
        """The live hyper-parameters: name to float or LearningRateSchedule."""
        return {p.name: getattr(self, p.name) for p in parameters(self) if p.live}

    def with_hyperparameters(self, values: Mapping[str, Threshold]) -> Clipper:
        """A copy with other values; `values` is keyed as `hyperparameters()` is."""
        return dataclasses.replace(self, **dict(values))

    def check_variables(self, variables: Sequence[Variable]) -> None:
        """Raise a ValueError if this clipper cannot serve these variables."""
        for variable in variables:
            if "complex" in str(getattr(variable, "dtype", "")):
                raise ValueError(
                    f"{type(self).__name__}: {path_of(variable)!r} is of dtype {variable.dtype}, "
                    "and what it is to clip a complex gradient is not defined. Exclude it: "
                    f"ClipMap({{{path_of(variable)!r}: None}}, default=...)."
                )

    def init(self, variables: Sequence[Variable]) -> State:
        """The running state before the first step: name to array. Most clippers have none."""
        del variables
        return {}

    def apply(
        self, grads: Sequence[Gradient], variables: Sequence[Variable], state: State, hyper: Hyper
    ) -> tuple[list[Tensor], State, ClipStats]:
        """Clip.

        Args:
            grads: one gradient a variable, of the variable's shape, any float dtype; None and
                `tf.IndexedSlices` without duplicate rows are allowed.
            variables: the variables, in the order in which `init` saw them.
            state: what `init`, or the last `apply`, returned.
            hyper: the values of `hyperparameters()` at this step, as float32 scalars; with
                `needs_learning_rate` also "learning_rate".

        Returns:
            The clipped gradients (dtypes as they came), the new state, and a `ClipStats`.
        """
        raise NotImplementedError  # abstract: each clipper's own

    def scheduled(self, state: State, rate: Scalar, is_new: bool) -> State:
        """The state when a schedule has set the learning rate: the one so far, or a new one."""
        del rate, is_new
        return state

    def bounded(self, variables: Sequence[Variable]) -> list[bool]:
        """For each variable, whether its steps may be bounded: others need not be looked at."""
        return [self.bounds_steps] * len(variables)

    def in_its_pass(
        self, grads: Sequence[Gradient], variables: Sequence[Variable], state: State, hyper: Hyper
    ) -> tuple[list[Tensor], State, ClipStats]:
        """`apply`; in the pass that is not this clipper's, what came, as it came."""
        if PASS not in hyper or self.bounds_steps == (hyper[PASS] == STEPS):
            return self.apply(grads, variables, state, hyper)
        count = len(grads)
        return list(grads), state, ClipStats(lambda: [None] * count, [0.0] * count, "norms")

    def __call__(self, grads: Sequence[Gradient], variables: Sequence[Variable]) -> list[Tensor]:
        """The clipped gradients, from a fresh state and with schedules at step 0.

        Args:
            grads: one gradient a variable (None and `tf.IndexedSlices` allowed).
            variables: the variables, in the same order.

        Returns:
            A list of gradients of the same shapes and dtypes.

        Raises:
            ValueError: the two lists differ in length, or a rule does not fit the variables.
        """
        if not all(isinstance(x, (list, tuple)) for x in (grads, variables)):
            raise ValueError(
                f"{type(self).__name__}: `grads` and `variables` must be lists, but are of types "
                f"{type(grads).__name__} and {type(variables).__name__}. Write "
                "clipper([gradient], [variable]) for one."
            )
        grads, variables = list(grads), list(variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"{type(self).__name__}: `grads` and `variables` must match one to one, but "
                f"there are {len(grads)} gradients and {len(variables)} variables."
            )
        self.check_variables(variables)
        grads = [kernels.merge_duplicate_rows(g) for g in grads]
        hyper = {k: current_value(v, 0) for k, v in self.hyperparameters().items()}
        if self.needs_learning_rate:  # the gradient is the step
            hyper[LEARNING_RATE] = ops.ones((), "float32")
        return self.apply(grads, variables, self.init(variables), hyper)[0]

    def get_config(self) -> Config:
        """The fields, JSON-able; `from_config` is its inverse."""
        return {
            f.name: serialize_value(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.init
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Threshold]) -> Clipper:
        """The clipper that `get_config` described."""
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        config = validation.config(cls.__name__, config, known)
        return cls(**{k: deserialize_value(v, cls.__name__, k) for k, v in config.items()})

    def rule_of(self, variables: Sequence[Variable]) -> list[tuple[str, Clipper | None]]:
        """For each variable, the name of the rule that applies to it and the clipper."""
        return [("*", self)] * len(variables)

    def remarks(self, variables: Sequence[Variable]) -> list[str]:
        """For each variable what is unexpected about its clip, in a few words; else ""."""
        return [""] * len(variables)

    def describe(self, model: Model) -> str:
        """A table of which rule hits which variable, and of what is unexpected.

        Args:
            model: a built `keras.Model`, or a list of variables.

        Returns:
            Text: a line a trainable variable, with its path, shape, rule and clipper.
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
        self.check_variables(variables)
        rows = [("variable", "shape", "rule", "clipper")]
        rules, remarks = self.rule_of(variables), self.remarks(variables)
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


def shown(value: object) -> str:
    """A hyper-parameter for people: `0.1`, `ExponentialDecay(0.1, 1000, 0.9)`."""
    if isinstance(value, validation.LearningRateSchedule):
        return _shown_schedule(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown_schedule(schedule: Threshold) -> str:
    """A schedule's class and its arguments, less those that are at their defaults."""
    owner = type(schedule)
    try:
        config = schedule.get_config()
    except NotImplementedError:  # somebody's own, without a config: its class must do
        return owner.__name__
    parts = []
    in_order = True
    for name, parameter in inspect.signature(owner).parameters.items():
        if name not in config or name == "name" or config[name] == parameter.default:
            in_order = False  # from here on by name
            continue
        value = shown(config[name])
        by_place = in_order and parameter.default is parameter.empty
        parts.append(value if by_place else f"{name}={value}")
    return f"{owner.__name__}({', '.join(parts)})"


def current_value(value: object, iterations: Variable) -> Tensor:
    """A hyper-parameter at a step: a number stays, a schedule is called; a float32 scalar.

    A schedule that falls to 0 or below counts as the smallest threshold there is: negative, the
    clip would turn gradients around. One that grows out of float32 counts as the largest.
    """
    if isinstance(value, validation.LearningRateSchedule):
        value = ops.clip(ops.cast(value(iterations), "float32"), kernels.TINY, kernels.LARGEST)
    return ops.cast(kernels.read(value), "float32")


def serialize_value(value: object) -> Tensor:
    if isinstance(value, (Clipper, validation.LearningRateSchedule)):
        return keras.saving.serialize_keras_object(value)
    return value


def deserialize_value(value: object, owner: str, name: str) -> Tensor:
    if isinstance(value, Mapping) and "class_name" in value:
        return validation.made_of(owner, name, dict(value), keras.saving.deserialize_keras_object)
    return value


#: What `get` finds by name: alias to class. Filled by `register`.
ALIASES: dict[str, type[Clipper]] = {}


def register(alias: str) -> Callable[[type[Clipper]], type[Clipper]]:
    """Class decorator: makes a clipper known to `get` and to Keras's serialisation."""

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
    """The registered clippers that flags and search spaces can make: alias to class."""
    return {alias: cls for alias, cls in ALIASES.items() if cls.selectable}


def threshold_of(cls: type[Clipper]) -> str | None:
    """The name of the parameter that decides how much a clipper clips."""
    return next((p.name for p in parameters(cls) if p.threshold), None)


def get(identifier: object) -> Clipper | None:
    """A clipper from whatever names one, as `keras.optimizers.get`.

    Args:
        identifier: None (off), a clipper, a name ("absolute", "exponential", "norm", or a class
            name), or a config dict as `serialize` gives it; `{"class_name": "absolute",
            "config": {"threshold": 0.05}}` will do.

    Returns:
        The clipper, or None.

    Raises:
        ValueError: nothing is known under that name, or the config does not fit.
    """
    if identifier is None or isinstance(identifier, Clipper):
        return identifier
    if isinstance(identifier, str):
        return _class(identifier)()
    if isinstance(identifier, Mapping):
        if "class_name" not in identifier:
            raise ValueError(
                "get: a clipper's config needs the key 'class_name', but has "
                f"{sorted(map(str, identifier))}. For rules by path write ClipMap({{...}})."
            )
        name = identifier["class_name"]
        if not isinstance(name, str):
            raise ValueError(f"get: the 'class_name' must be a string, but is {name!r}.")
        config = identifier.get("config") or {}
        if not isinstance(config, Mapping):
            raise ValueError(f"get: the 'config' of {name!r} must be a dict, but is {config!r}.")
        known = _find(name)
        if known is None:  # registered by somebody else, through Keras
            try:
                result = keras.saving.deserialize_keras_object(dict(identifier))
            except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
                raise ValueError(_unknown(name)) from error
            if not isinstance(result, Clipper):
                raise ValueError(f"get: {name!r} is no clipper, but {type(result).__name__}.")
            return result
        try:
            return known.from_config(config)
        except (TypeError, KeyError) as error:
            raise ValueError(f"get: the config of {name!r} does not fit: {error}.") from error
    raise ValueError(
        f"get: a clipper, its name or its config was expected, but {identifier!r} came. "
        "Try AbsoluteClip(0.1), or 'absolute'."
    )


def serialize(clipper: Clipper | None) -> Config | None:
    """A JSON-able dict that `get` turns back into the clipper; None for None."""
    if clipper is None:
        return None
    if not isinstance(clipper, Clipper):
        raise ValueError(f"serialize: a clipper was expected, but {clipper!r} came.")
    # Through JSON once, so that what cannot be saved is found here and not at the end of a run.
    return json.loads(json.dumps(keras.saving.serialize_keras_object(clipper)))


def _find(name: str) -> type[Clipper] | None:
    plain = name.rpartition(">")[2]
    for alias, cls in ALIASES.items():
        if plain in (alias, cls.__name__) or plain.lower() == alias:
            return cls
    return None


def _class(name: str) -> type[Clipper]:
    cls = _find(name)
    if cls is None:
        raise ValueError(_unknown(name))
    return cls


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"get: no clipper is called {name!r}; known are {sorted(ALIASES)}.{hint}"


def as_clipper(owner: str, name: str, value: object, *, optional: bool) -> Clipper | None:
    """`value`, which may be anything that `get` takes, as a clipper (None if that means off).

    Raises:
        ValueError: it is something else.
    """
    if value is None and not optional:
        raise ValueError(
            f"{owner}: `{name}` must be a clipper such as AbsoluteClip(0.1), not None."
        )
    try:
        return get(value)
    except ValueError as error:
        raise ValueError(f"{owner}: `{name}` is no clipper. {error}") from error
