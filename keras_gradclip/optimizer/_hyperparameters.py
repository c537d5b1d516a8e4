"""The live thresholds of an optimizer, as a mapping to read and to set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import keras
import numpy as np
from keras import ops

from keras_gradclip import _validation as validation
from keras_gradclip import aggregation
from keras_gradclip._types import Scalar
from keras_gradclip.clippers.base import Clipper, current_value


def is_schedule(value: object) -> bool:
    """Whether a hyper-parameter follows a schedule, and so has no variable."""
    return validation.is_schedule(value)


class ClipHyperparameters(MutableMapping):
    """The live thresholds of an optimizer: names as in `clipper.hyperparameters()`.

    Reading gives the current value as a float. Setting takes effect from the next step on,
    without a retrace, as `optimizer.learning_rate = ...` does. Inside an epoch on JAX, call
    `model.jax_state_sync()` first, as for the learning rate.
    """

    def __init__(self, values: Mapping[str, keras.Variable], iterations: keras.Variable) -> None:
        self._values, self._iterations = values, iterations

    def __getitem__(self, name: str) -> float:
        value = self._values[self._known(name)]
        if is_schedule(value):
            value = value(ops.convert_to_tensor(aggregation.to_numpy(self._iterations)))
        return float(aggregation.to_numpy(value))

    def __setitem__(self, name: str, value: Scalar) -> None:
        current = self._values[self._known(name)]
        if is_schedule(current):
            raise TypeError(
                f"clip_hyperparameters[{name!r}] follows the schedule {current!r} and cannot be "
                "set. Build the clipper with a number to be able to."
            )
        is_symbolic = ops.is_tensor(value) and not hasattr(value, "__float__")
        if not is_symbolic:
            value = validation.positive("clip_hyperparameters", name, value)
        current.assign(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(
            f"clip_hyperparameters[{name!r}] cannot be deleted: a clipper always has its "
            f"thresholds. {validation.CLIP_NOTHING}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self))

    def at_this_step(self) -> dict[str, Scalar]:
        """The thresholds as float32 scalars of the backend."""
        return {name: current_value(v, self._iterations) for name, v in self._values.items()}

    def put_into(self, clipper: Clipper) -> Clipper:
        """`clipper` with the thresholds that are in force now."""
        values = dict(clipper.hyperparameters())
        for key, given in values.items():
            now = given if is_schedule(given) else self[key]
            if now is not given and np.float32(given) != np.float32(now):
                values[key] = now  # set since; otherwise keep the number as it was written
        return clipper.with_hyperparameters(values)

    def _known(self, name: str) -> str:
        if name not in self._values:
            raise KeyError(f"no clip hyper-parameter is called {name!r}; there are {list(self)}")
        return name


def threshold_variables(
    add_variable: Callable[..., keras.Variable], clipper: Clipper | None
) -> dict[str, keras.Variable | keras.optimizers.schedules.LearningRateSchedule]:
    """For each live threshold of `clipper` a variable, or its schedule."""
    result = {}
    for key, value in (clipper.hyperparameters() if clipper else {}).items():
        if not is_schedule(value):
            name = "clip_" + "".join(c if c.isalnum() else "_" for c in key)
            initializer = keras.initializers.Constant(value)
            value = add_variable((), initializer, "float32", aggregation="none", name=name)
        result[key] = value
    return result


def check_learning_rate(inner: keras.optimizers.Optimizer, clipper: Clipper) -> None:
    """Raise a ValueError if `clipper` needs a learning rate and `inner` has none."""
    if clipper.needs_learning_rate and getattr(inner, "learning_rate", None) is None:
        raise ValueError(
            f"ClippedOptimizer: `inner_optimizer` ({type(inner).__name__}) has no learning "
            f"rate, which the clipper {clipper} divides by. Use one that does not, e.g. "
            "AdaptiveClip(0.01)."
        )
