"""The part of `ClipMonitor` that runs on the device: a watcher that takes one update in many."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import aggregation
from keras_gradclip._types import Gradient, Gradients, Scalar, Tensor
from keras_gradclip.diagnostics.watch import RingBuffer, strategy_scope
from keras_gradclip.optimizer._watcher import ClippedUpdate
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

#: What is measured on the device for each variable in a sampled update.
ROWS = ("square_before", "square_after", "chord", "clip_fraction", "max_abs", "bad", "bad_since")
#: What is written for each variable.
FIELDS = ("norm_before", "norm_after", "clip_fraction", "max_abs", "angle", "nonfinite")


class Recorder:
    """Takes the figures of one update in `every`, on the device.

    Samples go round in a buffer of `capacity`, so that the host need not look at every step.
    """

    def __init__(self, optimizer: ClippedOptimizer, every: int, capacity: int) -> None:
        self.optimizer, self.every, self.capacity = optimizer, every, capacity
        self.thresholds: list[str] = []
        self._state: list[keras.Variable] = []
        self.start = 0  # the number of updates before
        if optimizer.built:
            self._build()
            self.start = int(aggregation.to_numpy(optimizer.iterations))

    def _build(self) -> None:
        self.thresholds = list(self.optimizer.clip_hyperparameters)
        count = len(self.optimizer._trainable_variables)
        with strategy_scope(self.optimizer):
            # A record: the figures; the length of the window that ends with it and the thresholds.
            shapes = [(len(ROWS), count), (1 + len(self.thresholds),)]
            self.buffer = RingBuffer("ClipMonitor", self.capacity, shapes)
            self.has_sample = aggregation.zeros((), "has_sample")  # since the last `force`
            # Since the last sample, skipped ones included; of them, with a bad gradient.
            self.updates = aggregation.zeros((), "updates")
            self.nonfinite = aggregation.zeros((count,), "nonfinite")
        self._state = [*self.buffer.state, self.has_sample, self.updates, self.nonfinite]

    def _build_where_traced(self) -> None:
        """Build after the optimizer, where training builds it."""
        if not self._state:
            with aggregation.outside_of_traces(self.optimizer._trainable_variables):
                self._build()

    @property
    def is_built(self) -> bool:
        """Whether the optimizer knows its variables, and so does this."""
        return bool(self._state)

    def force(self) -> None:
        """Measure the next update, whatever its number."""
        if self._state:
            self.has_sample.assign(0.0)

    @property
    def state(self) -> Sequence[keras.Variable]:
        """What the two methods below write."""
        return self._state

    def on_skip(self, gradients: Gradients) -> None:
        """Count the bad gradients of an update that is left out."""
        self._build_where_traced()
        bad = [
            0.0 if g is None else 1.0 - arithmetic.float32(arithmetic.all_finite([g]))
            for g in gradients
        ]
        self.updates.assign(self.updates + 1.0)
        self.nonfinite.assign(self.nonfinite + ops.stack([arithmetic.float32(b) for b in bad]))

    def on_update(self, update: ClippedUpdate) -> None:
        """Take a sample, if it is this update's turn."""
        self._build_where_traced()
        self.updates.assign(self.updates + 1.0)
        iterations = arithmetic.read(self.optimizer.inner_optimizer.iterations)
        is_due = ops.logical_or(ops.equal(iterations % self.every, 0), self.has_sample < 1)
        aggregation.local_cond(
            is_due,
            lambda: self._sample(iterations, update),
            self._state,
            self.optimizer._trainable_variables,
        )

    def _sample(self, iterations: Tensor, update: ClippedUpdate) -> None:
        zero = ops.zeros((), "float32")
        count = len(update.gradients)
        fractions = update.stats.fractions() if update.stats else [None] * count
        columns = [
            [zero] * (len(ROWS) - 1) if x is None else _figures(x, y, zero if f is None else f)
            for x, y, f in zip(update.gradients, update.clipped, fractions, strict=True)
        ]
        figures = ops.transpose(ops.stack([ops.stack(column) for column in columns]))
        figures = ops.concatenate([figures, arithmetic.read(self.nonfinite)[None]])
        window = [arithmetic.read(self.updates), *(update.hyper[name] for name in self.thresholds)]
        self.buffer.write(iterations, figures, ops.stack(window))
        self.has_sample.assign(ops.ones(()))
        self.updates.assign(ops.zeros(()))
        self.nonfinite.assign(ops.zeros(self.nonfinite.shape))

    # On the host -----------------------------------------------------------------------------

    def fetch(self) -> list[tuple[int, dict[str, np.ndarray], dict[str, float]]]:
        """The samples since the last fetch: step, an array a field, thresholds by name."""
        samples = []
        for step, (figures, window) in self.buffer.fetch() if self._state else ():
            bad = figures[ROWS.index("bad")]
            before, after = np.sqrt(figures[0]), np.sqrt(figures[1])
            angle = np.degrees(2 * np.arcsin(np.clip(np.sqrt(figures[2]) / 2, 0, 1)))
            angle[(before == 0) | (after == 0)] = 0.0  # no direction to compare
            skipped = figures[ROWS.index("bad_since")] / max(window[0], 1.0)
            row = {
                "norm_before": before,
                "norm_after": after,
                "clip_fraction": figures[3],
                "max_abs": figures[4],
                "angle": angle,
                # A skipped update is not sampled; an applied one counts as bad as a whole.
                "nonfinite": np.where(bad > 0, 1.0, skipped),
            }
            for name in FIELDS[:-1]:
                row[name][bad > 0] = np.nan
            thresholds = dict(zip(self.thresholds, map(float, window[1:]), strict=True))
            samples.append((step, row, thresholds))
        return samples

    def fetch_skipped(self) -> np.ndarray | None:
        """For each variable the share of bad gradients since the last sample; then anew."""
        if not self._state:
            return None
        updates, bad = (
            float(aggregation.to_numpy(self.updates)),
            aggregation.to_numpy(self.nonfinite).astype("float64"),
        )
        if not bad.any():
            return None
        self.updates.assign(0.0)
        self.nonfinite.assign(np.zeros(bad.shape, "float32"))
        return bad / max(updates, 1.0)


def _figures(before: Gradient, after: Gradient, fraction: Scalar) -> list[Tensor]:
    """The first rows for one variable; zeros where its gradient is not finite."""
    zero = ops.zeros((), "float32")
    x, y = (arithmetic.float32(arithmetic.values(g)) for g in (before, after))
    square_x, square_y = arithmetic.sum_of_squares(x), arithmetic.sum_of_squares(y)
    # |x/‖x‖ − y/‖y‖|² gives small angles that the cosine loses in float32.
    direction_x = x * ops.rsqrt(ops.maximum(square_x, arithmetic.TINY))
    direction_y = y * ops.rsqrt(ops.maximum(square_y, arithmetic.TINY))
    chord = arithmetic.sum_of_squares(direction_x - direction_y)
    is_finite = ops.isfinite(square_x)
    row = [square_x, square_y, chord, fraction, arithmetic.max_abs(x)]
    return [*(ops.where(is_finite, c, zero) for c in row), 1.0 - arithmetic.float32(is_finite)]
