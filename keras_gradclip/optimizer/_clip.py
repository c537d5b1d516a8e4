"""The clip of an optimizer: its clipper, the thresholds in force, and the running state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import aggregation
from keras_gradclip._types import Gradient, State, Tensor
from keras_gradclip.clippers.base import Clipper
from keras_gradclip.clippers.enforce import LEARNING_RATE, RATE_IS_SET, Enforcer, combined
from keras_gradclip.optimizer._hyperparameters import (
    ClipHyperparameters,
    check_learning_rate,
    threshold_variables,
)
from keras_gradclip.optimizer._steps import ignores_scale
from keras_gradclip.optimizer._watcher import ClippedUpdate


class Clip:
    """Clips the gradients of an optimizer, or the changes of weights that it computes.

    Args:
        clipper: the clipper; None clips nothing.
        inner: the inner optimizer.
        add_variable: `add_variable` of the optimizer that keeps the variables.

    Attributes:
        clipper: as given: with the thresholds it was made with.
        thresholds: live thresholds by name: a variable, or a schedule.
        state: what the clipper remembers, by name; empty before `build`.
        enforcer: enforces the clipper's limits, from `build` on.
    """

    def __init__(
        self,
        clipper: Clipper | None,
        inner: keras.optimizers.Optimizer,
        add_variable: Callable[..., keras.Variable],
    ) -> None:
        if clipper is not None:
            check_learning_rate(inner, clipper)
        self.clipper, self._inner, self._add_variable = clipper, inner, add_variable
        self.thresholds = threshold_variables(add_variable, clipper)
        self.state: dict[str, keras.Variable] = {}

    def resolve(self, variables: Sequence[keras.Variable]) -> None:
        """Find out who limits what."""
        assignments = [] if self.clipper is None else self.clipper.assignments(variables)
        self.enforcer = Enforcer(assignments, variables, not ignores_scale(self._inner))
        self._limited = self.enforcer.limited_updates()

    def build(self) -> None:
        """Create the state; every replica writes the same into its own copy."""
        for i, (key, value) in enumerate(self.enforcer.state.items()):
            self.state[key] = self._add_variable(
                np.asarray(value).shape,
                functools.partial(_constant, value),
                str(np.asarray(value).dtype),
                aggregation="none",
                name=f"clip_state_{i}",
            )

    @property
    def now(self) -> Clipper | None:
        """The clipper with the thresholds that are in force now."""
        iterations = self._inner.iterations
        values = ClipHyperparameters(self.thresholds, iterations)
        return None if self.clipper is None else values.put_into(self.clipper)

    @property
    def limits_changes(self) -> bool:
        """Whether the changes of weights are clipped, by `clip_changes`."""
        return self.enforcer.limits_updates

    def limited(self, variables: Sequence[keras.Variable]) -> dict[int, int]:
        """`id` to position of the variables whose change may be limited."""
        return {id(variables[i]): i for i in self._limited}

    def clip(self, gradients: list[Gradient]) -> ClippedUpdate:
        """Clip gradients, rescale, and count what was clipped."""
        state = {key: arithmetic.read(v) for key, v in self.state.items()}
        hyper = ClipHyperparameters(self.thresholds, self._inner.iterations).at_this_step()
        if self.clipper is not None and self.clipper.needs_learning_rate:
            rate = self._inner.learning_rate
            hyper[LEARNING_RATE] = arithmetic.float32(arithmetic.read(rate))
            hyper[RATE_IS_SET] = isinstance(rate, keras.Variable)
        clipped, new_state, stats = self.enforcer.clip(gradients, state, hyper)
        return ClippedUpdate(gradients, clipped, stats, hyper, {**state, **new_state})

    def clip_changes(
        self,
        update: ClippedUpdate,
        changes: Mapping[int, Tensor],
        weights: Mapping[int, Tensor],
    ) -> tuple[list[Gradient], ClippedUpdate]:
        """Clip what the inner optimizer wants to add to the weights.

        Args:
            update: what `clip` returned.
            changes: by position of the variable.
            weights: those from before the change, by position.

        Returns:
            The clipped changes, one entry a variable, and the update with what was clipped.
        """
        assert update.stats is not None
        variables = self.enforcer.variables
        every = range(len(variables))
        clipped, state, stats = self.enforcer.clip(
            [changes.get(i) for i in every],
            update.state,
            update.hyper,
            [weights.get(i) for i in every],
        )
        both = combined([(every, update.stats), (every, stats)], variables)
        new_state = {**update.state, **state}
        return clipped, ClippedUpdate(
            update.gradients, update.clipped, both, update.hyper, new_state
        )

    def keep(self, state: State) -> None:
        """Remember `state`."""
        for key, variable in self.state.items():
            variable.assign(state[key])

    def reset(self) -> None:
        """Forget: norms seen, the largest learning rate."""
        if self.state:
            self.keep(self.enforcer.state)

    def note_schedule(self, is_new: bool) -> None:
        """A schedule, or a new one, has set the learning rate."""
        if self.state and self.clipper is not None and self.clipper.needs_learning_rate:
            state = {key: aggregation.to_numpy(v) for key, v in self.state.items()}
            rate = np.float32(aggregation.to_numpy(self._inner.learning_rate))
            self.keep(self.enforcer.scheduled(state, rate, is_new))


def _constant(value: object, shape: Sequence[int], dtype: str | None = None) -> Tensor:
    del shape
    return ops.convert_to_tensor(np.asarray(value), dtype=dtype)
