"""The part of `calibrate` that runs on the device: a watcher that keeps every update's figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import aggregation
from keras_gradclip._types import Gradient, Gradients, Tensor
from keras_gradclip.clippers.units import unit_of
from keras_gradclip.diagnostics.watch import RingBuffer, counter, strategy_scope, sync
from keras_gradclip.optimizer._steps import ignores_scale
from keras_gradclip.optimizer._watcher import ClippedUpdate
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer


class Sampler:
    """A watcher that keeps five figures a variable, and the learning rate, of each update."""

    def __init__(self, optimizer: ClippedOptimizer, capacity: int, beta: float, eps: float) -> None:
        self.optimizer, self.beta, self.eps = optimizer, beta, eps
        self.variables = list(optimizer._trainable_variables)
        self.samples: list[np.ndarray] = []
        self.rates: list[float] = []
        with strategy_scope(optimizer):
            self._buffer = RingBuffer("calibrate", capacity, [(5, len(self.variables)), ()])
            self._skipped = counter("skipped")

    @property
    def state(self) -> Sequence[keras.Variable]:
        """What the two methods below write."""
        return [*self._buffer.state, self._skipped]

    @property
    def skipped(self) -> int:
        """Updates that were left out."""
        return int(aggregation.to_numpy(self._skipped))

    def fetch(self) -> int:
        """Bring what is new to the host; the number of updates so far, skipped ones included."""
        for _, (figures, rate) in self._buffer.fetch():
            self.samples.append(figures)
            self.rates.append(float(rate))
        return len(self.samples) + self._buffer.lost + self.skipped

    def on_skip(self, gradients: Gradients) -> None:
        """Count it."""
        del gradients
        self._skipped.assign(self._skipped + 1)

    def on_update(self, update: ClippedUpdate) -> None:
        """Keep its figures."""
        rate = self._learning_rate()
        pairs = zip(update.gradients, self.variables, strict=True)
        columns = [self._of(g, v, rate) for g, v in pairs]
        figures = ops.transpose(ops.stack([ops.stack(c) for c in columns]))
        self._buffer.write(self.optimizer.inner_optimizer.iterations, figures, rate)

    def _of(self, gradient: Gradient, variable: keras.Variable, rate: Tensor) -> list[Tensor]:
        """Square norm, largest element, largest |g|·exp(−βW), largest unit ratio, and the step's.

        A step of an optimizer that ignores a gradient's scale is taken for η an element.
        """
        if gradient is None:
            return [ops.zeros((), "float32")] * 5
        x = arithmetic.float32(arithmetic.values(gradient))
        weight = arithmetic.float32(arithmetic.matching_rows(arithmetic.read(variable), gradient))
        axes = unit_of(variable).axes
        whole = arithmetic.float32(ops.convert_to_tensor(variable)) if 0 in axes else weight
        unit = ops.sqrt(arithmetic.unit_squares(x, axes))
        floor = ops.maximum(ops.sqrt(arithmetic.unit_squares(whole, axes)), self.eps)
        ratio = arithmetic.max_abs(unit / floor)
        step = ratio
        if ignores_scale(self.optimizer.inner_optimizer):
            size = math.prod(int(variable.shape[axis]) for axis in axes)
            step = arithmetic.max_abs(math.sqrt(size) / floor)
        return [
            arithmetic.sum_of_squares(x),
            arithmetic.max_abs(x),
            arithmetic.max_abs(ops.abs(x) / arithmetic.exp_of(self.beta, weight)),
            ratio,
            step * rate,
        ]

    def _learning_rate(self) -> Tensor:
        """At this step; 0 of an optimizer that has none."""
        rate = getattr(self.optimizer.inner_optimizer, "learning_rate", None)
        return arithmetic.float32(0.0 if rate is None else arithmetic.read(rate))


class Watch(keras.callbacks.Callback):
    """Attaches samplers, fetches after each batch, ends training after a number of updates."""

    def __init__(self, samplers: Sequence[Sampler], updates: int) -> None:
        super().__init__()
        self.samplers, self.updates = samplers, updates

    def on_train_begin(self, logs: object = None) -> None:
        """The step must be traced with the watcher."""
        for sampler in self.samplers:
            sampler.optimizer.watch(sampler)
        self.model.make_train_function(force=True)

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        """Look at the counters."""
        sync(self.model)
        counts = [sampler.fetch() for sampler in self.samplers]
        if max(counts) and min(filter(None, counts)) >= self.updates:  # of those that are in use
            self.model.stop_training = True
