"""The clip of an optimizer: its clipper, the thresholds in force, and the running state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip import _validation as validation
from keras_gradclip._layers import networks_of
from keras_gradclip._types import Gradient, Scalar, State, Tensor
from keras_gradclip.clippers.base import Clipper, current_value
from keras_gradclip.clippers.enforce import LEARNING_RATE, RATE_IS_SET, Enforcer, combined
from keras_gradclip.names import as_saved
from keras_gradclip.optimizer._advice import warn_of_muon, warn_of_remarks
from keras_gradclip.optimizer._inner import is_plain_sgd
from keras_gradclip.optimizer._watcher import ClippedUpdate


class Clip:
    """Clips the gradients of an optimizer, or its weight updates.

    Attributes:
        clipper: the given clipper, with its initial thresholds; None clips nothing.
        thresholds: live thresholds by name: a variable, or a schedule.
        state: the clipper's running state by name; empty before `build`.
        paths: those of the variables, as saved with rules by path; None before `resolve`.
        enforcer: enforces the clipper's limits; set by `resolve`.
        limited: `id` to position of the variables whose weight update may be limited.
    """

    def __init__(
        self,
        clipper: Clipper | None,
        inner: keras.optimizers.Optimizer,
        add_variable: Callable[..., keras.Variable],
    ) -> None:
        self.clipper, self._inner, self._add_variable = clipper, inner, add_variable
        self.thresholds: dict[str, Any] = {}
        for key, value in (clipper.hyperparameters() if clipper else {}).items():
            if not validation.is_schedule(value):
                name = "clip_" + "".join(c if c.isalnum() else "_" for c in key)
                initializer = keras.initializers.Constant(value)
                value = add_variable((), initializer, "float32", aggregation="none", name=name)
            self.thresholds[key] = value
        self.state: dict[str, keras.Variable] = {}
        self.paths: Sequence[str] | None = None

    def resolve(self, variables: Sequence[keras.Variable]) -> None:
        """Assigns clippers to variables, and warns of unexpected assignments.

        Raises:
            ValueError: a ClipMap's rule matches none of the variables, or two rules collide; a
                limit on the weight update, but no learning rate.
        """
        if self.clipper is not None:
            every = list(variables)
            if self.clipper.has_rules:  # rules may match frozen variables of the network
                own = {id(v) for v in variables}
                beside = (v for network in networks_of(variables) for v in network.variables)
                every += {id(v): v for v in beside if id(v) not in own}.values()
                self.paths = as_saved(every, self.paths)
            self.clipper.check_variables(every)
            warn_of_muon(self._inner, self.clipper, variables)
        assignments = self.clipper.assignments(variables) if self.clipper else []
        is_update = any(a.clipper.stage == "update" for a in assignments)
        if is_update and self._inner.learning_rate is None:
            raise ValueError(
                f"ClippedOptimizer: `inner_optimizer` ({type(self._inner).__name__}) has no "
                f"learning rate, which the clipper {self.clipper} divides by. Use one that does "
                "not, e.g. AdaptiveClip(0.01)."
            )
        self.enforcer = Enforcer(assignments, variables, is_plain_sgd(self._inner))
        self.limited = {id(variables[i]): i for i in self.enforcer.limited_updates()}
        warn_of_remarks(self.enforcer)

    def build(self) -> None:
        """Creates the state; every replica writes the same values to its copy."""
        for i, (key, value) in enumerate(self.enforcer.state.items()):
            array = np.asarray(value)
            self.state[key] = self._add_variable(
                array.shape,
                keras.initializers.Constant(array),
                str(array.dtype),
                aggregation="none",
                name=f"clip_state_{i}",
            )

    def saved(self) -> dict[str, keras.Variable]:
        """The variables by their names in files."""
        live = {k: v for k, v in self.thresholds.items() if isinstance(v, keras.Variable)}
        named = {f"hyper:{k}": v for k, v in live.items()}
        return named | {f"state:{k}": v for k, v in self.state.items()}

    @property
    def now(self) -> Clipper | None:
        """The clipper with the present thresholds."""
        if self.clipper is None:
            return None
        current = ClipHyperparameters(self)
        values = dict(self.clipper.hyperparameters())
        for key, given in values.items():
            now = given if validation.is_schedule(given) else current[key]
            if now is not given and np.float32(given) != np.float32(now):
                values[key] = now  # changed since; otherwise keep the given number
        return self.clipper.with_hyperparameters(values)

    def clip(self, gradients: list[Gradient]) -> ClippedUpdate:
        """Clips and rescales gradients, and counts what was clipped."""
        state = {key: arithmetic.read(v) for key, v in self.state.items()}
        calls = self._inner.iterations
        hyper = {name: current_value(v, calls) for name, v in self.thresholds.items()}
        rate = self._inner.learning_rate
        if rate is not None:
            hyper[LEARNING_RATE] = current_value(rate, calls)
            hyper[RATE_IS_SET] = isinstance(rate, keras.Variable)
        with aggregation.without_waiting():
            clipped, new_state, stats = self.enforcer.clip(gradients, state, hyper)
        return ClippedUpdate(gradients, clipped, stats, hyper, {**state, **new_state})

    def clip_changes(
        self,
        update: ClippedUpdate,
        finish: Callable[[ClippedUpdate], None],
        variables: Sequence[keras.Variable],
        changes: Sequence[Tensor],
        before: Sequence[Tensor],
    ) -> list[Tensor]:
        """The new weights, from those before and the limited weight updates (`changes`).

        Calls `finish` with `update`, the result of `clip`, and the new statistics and state.
        """
        assert update.stats is not None
        every = self.enforcer.variables
        given: list[Gradient] = [None] * len(every)
        weights: list[Tensor | None] = [None] * len(every)
        places = [self.limited.get(id(v)) for v in variables]
        for i, change, weight in zip(places, changes, before, strict=True):
            if i is not None:
                given[i], weights[i] = change, weight
        with aggregation.without_waiting():
            clipped, state, stats = self.enforcer.clip(given, update.state, update.hyper, weights)
        stats = combined([update.stats, stats], every)
        finish(dataclasses.replace(update, stats=stats, state={**update.state, **state}))
        return [
            weight + change if i is None else clipped[i]
            for i, change, weight in zip(places, changes, before, strict=True)
        ]

    def keep(self, state: State) -> None:
        """Stores `state`."""
        for key, variable in self.state.items():
            variable.assign(state[key])

    def reset(self) -> None:
        """Resets the running state: past norms, the largest learning rate."""
        if self.state:
            self.keep(self.enforcer.state)

    def on_new_rate(self) -> None:
        """Tells the clipper if a schedule, or a callback like one, has set the learning rate."""
        if not self.state:
            return
        goes_on = _compat.is_called_by(
            keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau
        )
        if goes_on or not isinstance(self._inner.learning_rate, keras.Variable):
            state = {key: aggregation.to_numpy(v) for key, v in self.state.items()}
            rate = np.float32(aggregation.to_numpy(self._inner.learning_rate))
            self.keep(self.enforcer.scheduled(state, rate, is_new=not goes_on))


class ClipHyperparameters(MutableMapping):
    """The live thresholds of an optimizer: names as in `clipper.hyperparameters()`.

    Reading gives the current value as a float. Setting takes effect from the next step on,
    without a retrace, as `optimizer.learning_rate = ...` does. Inside an epoch on JAX, call
    `model.jax_state_sync()` first, as for the learning rate.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip, self._values = clip, clip.thresholds

    def __getitem__(self, name: str) -> float:
        value = self._values[self._known(name)]
        if validation.is_schedule(value):
            iterations = aggregation.to_numpy(self._clip._inner.iterations)
            value = value(ops.convert_to_tensor(iterations))
        return float(aggregation.to_numpy(value))

    def __setitem__(self, name: str, value: Scalar) -> None:
        current = self._values[self._known(name)]
        if validation.is_schedule(current):
            raise TypeError(
                f"clip_hyperparameters[{name!r}] follows the schedule {current!r} and cannot be "
                "set. Build the clipper with a number to be able to."
            )
        is_symbolic = ops.is_tensor(value) and not hasattr(value, "__float__")
        if not is_symbolic:
            advice = validation.CLIP_NOTHING
            value = validation.positive("clip_hyperparameters", name, value, advice=advice)
            assert self._clip.clipper is not None
            self._clip.clipper.with_hyperparameters({name: value})  # checks its own bounds
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

    def _known(self, name: str) -> str:
        if name not in self._values:
            raise KeyError(f"no clip hyper-parameter is called {name!r}; there are {list(self)}")
        return name
