"""Restoring of a model and its metrics after a training step whose update is skipped.

By the time gradients are checked, the step has written batch statistics, recurrent states, random
states and metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import keras
from keras import backend, ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat, aggregation
from keras_gradclip._types import Config, Scalar, Tensor

#: The result of a train step; a custom one may return anything.
Logs: TypeAlias = Mapping[str, Tensor] | object


class Undo:
    """Restores the states of layers and metrics that the steps of a skipped update have written.

    With accumulation, to their values before the first of its steps. The model is compiled with
    the ClippedOptimizer `wrapper`.
    """

    def __init__(self, model: keras.Model, wrapper: keras.optimizers.Optimizer) -> None:
        self._model = model
        self._wrapper = wrapper
        self._steps = wrapper.gradient_accumulation_steps or 1
        self._is_inside = False
        #: `id` of a variable to a copy from before the first micro-batch of the update.
        self._copies: dict[int, keras.Variable] = {}
        self._has_copies: keras.Variable = None  # 0 before the first micro-batch

    @property
    def state(self) -> list[keras.Variable]:
        """The variables with copies; none without accumulation."""
        return [*self._copies.values(), *([] if self._has_copies is None else [self._has_copies])]

    def build(self) -> None:
        """Creates `state`."""
        if self._steps == 1:
            return
        missing = [v for v in self._written() if id(v) not in self._copies]
        with aggregation.outside_of_traces(missing):
            for v in missing:
                name = f"before_update_{len(self._copies)}"
                self._copies[id(v)] = aggregation.local_variable(v.shape, v.dtype, name)
            if self._has_copies is None:
                self._has_copies = aggregation.local_variable((), "float32", "has_copies")

    def _written(self) -> list[keras.Variable]:
        return [*_compat.states(self._model), *self._model.metrics_variables]

    def _indicators(self) -> list[keras.Variable]:
        """Variables that change if an update is skipped: a counter, and maybe a loss scale.

        On JAX and PyTorch, `LossScaleOptimizer` skips without calling the wrapper.
        """
        outer = self._model.optimizer
        is_called = outer is self._wrapper or backend.backend() == "tensorflow"
        return [self._wrapper._skipped, *([] if is_called else [outer.dynamic_scale])]

    def around(self, step: Callable[[Tensor], Logs]) -> Callable[[Tensor], Logs]:
        """A train step that calls `step` and restores the model if its update was skipped."""

        def restoring_step(data: Tensor) -> Logs:
            if backend.backend() == "tensorflow":
                _compat.build_metrics(self._model, step, data)
            optimizer, trained = self._model.optimizer, self._model.trainable_variables
            if not optimizer.built:  # the counter of skips has to exist before the step
                if not trained:
                    return step(data)
                with aggregation.outside_of_traces(trained):
                    optimizer.build(trained)
            self.build()
            written = self._written()
            before = [_now(v) for v in written]
            indicators = [_now(v) for v in self._indicators()]
            if self._steps > 1:
                before = self._before_the_update(written, before)
            self._is_inside = True
            try:
                logs = step(data)
                is_skipped = _was_skipped(indicators, [_now(v) for v in self._indicators()])
                restore = functools.partial(aggregation.assign_each, written)
                aggregation.cond(is_skipped, restore, args=(before,))
                return self.counted(logs)
            finally:
                self._is_inside = False

        return restoring_step

    def _before_the_update(
        self, written: Sequence[keras.Variable], now: Sequence[Tensor]
    ) -> list[Tensor]:
        """The values before the first micro-batch of the update, which copies them."""
        kept = [self._copies[id(v)] for v in written]
        is_first = self._is_first(_now(self._wrapper._iterations), _now(self._has_copies))
        before = [ops.where(is_first, new, _now(old)) for new, old in zip(now, kept, strict=True)]
        for variable, value in zip(kept, before, strict=True):
            variable.assign(value)
        self._has_copies.assign(1.0)
        return before

    def _is_first(self, calls: Tensor, has_copies: Tensor) -> Tensor:
        """Whether this is the first micro-batch of its update, or of a resumed run."""
        return ops.logical_or(ops.equal(calls % self._steps, 0), ops.equal(has_copies, 0.0))

    def of_state(self, before: Sequence, after: Sequence) -> tuple:
        """The state `after` a step on JAX, restored if the update was skipped.

        A state is the values of the trainable variables, the others, the optimizer's, the metrics'.
        """
        optimizer = self._model.optimizer.variables
        old, new = (dict(zip(map(id, optimizer), s[2], strict=True)) for s in (before, after))
        indicators = [[values[id(v)] for v in self._indicators()] for values in (old, new)]
        is_skipped = _was_skipped(*indicators)
        is_first = None
        if self._steps > 1:
            is_first = self._is_first(old[id(self._wrapper._iterations)], old[id(self._has_copies)])
            new[id(self._has_copies)] = ops.ones((), "float32")

        def restored(variables: Sequence[keras.Variable], i: int) -> list[Tensor]:
            result = []
            for v, was, now in zip(variables, before[i], after[i], strict=True):
                kept = self._copies.get(id(v))
                if kept is not None:
                    was = new[id(kept)] = ops.where(is_first, was, old[id(kept)])
                result.append(now if now is was else ops.where(is_skipped, was, now))
            return result

        states = restored(self._model.non_trainable_variables, 1)
        metrics = restored(self._model.metrics_variables, 3)
        return (after[0], states, [new[id(v)] for v in optimizer], metrics)

    def counted(self, logs: Logs) -> Logs:
        """`logs` with the results of the restored metrics, once these have counted anything."""
        figures = self._model.get_metrics_result()
        if not isinstance(logs, Mapping) or not {*logs} <= {*figures}:
            return logs  # of a custom train step
        is_any = self._is_any_counted()
        return {
            k: ops.where(is_any, figures[k], ops.cast(v, figures[k].dtype)) for k, v in logs.items()
        }

    def _is_any_counted(self) -> Scalar:
        counts = [arithmetic.float32(_now(m.count)) for m in _means(self._model.metrics)]
        return ops.max(ops.stack(counts)) > 0 if counts else True

    def of_epoch(self, figures: Config) -> Config:
        """The metrics of an epoch: NaN instead of 0 if all its updates were skipped."""
        if self._is_inside or not self._wrapper.built:
            return figures
        nothing = ops.logical_not(self._is_any_counted())
        is_empty = ops.logical_and(nothing, arithmetic.read(self._wrapper._skipped) > 0)
        return {k: ops.where(is_empty, float("nan"), v) for k, v in figures.items()}

    def on_reset_metrics(self) -> None:
        """Resets the copies of metrics, which belong to the last epoch."""
        for v in self._model.metrics_variables:
            if id(v) in self._copies:
                # JAX donates each buffer once.
                self._copies[id(v)].assign(ops.copy(arithmetic.read(v)))


def _means(metrics: Sequence[keras.metrics.Metric]) -> list[keras.metrics.Metric]:
    """The metrics with a count, also those nested in others of `Model.metrics`."""
    found = [metric for metric in metrics if isinstance(metric, keras.metrics.Mean)]
    for metric in metrics:
        found += _means(getattr(metric, "metrics", None) or [])
    return found


def _now(variable: keras.Variable) -> Tensor:
    value = arithmetic.read(variable)
    # PyTorch assigns in place.
    return ops.copy(value) if backend.backend() == "torch" else value


def _was_skipped(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Whether an update was skipped, by the `_indicators` before and after it."""
    is_skipped = ops.not_equal(before[0], after[0])
    for old, new in zip(before[1:], after[1:], strict=True):
        is_skipped = ops.logical_or(is_skipped, new < old)
    return is_skipped
