"""Telemetry: gradient norms and clip fractions by layer, and the first non-finite gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _validation as validation
from keras_gradclip import aggregation
from keras_gradclip._types import Config, Gradients, Scalar
from keras_gradclip.names import layers_of, path_of
from keras_gradclip.optimizer._watcher import ClippedUpdate

_UPDATE, _SKIPPED = (True, False), (False, True)


class Telemetry:
    """A `Watcher` that averages figures on the device since the last reset.

    Args:
        every: measure one update in this many, from the first after a reset on; False: none.

    Attributes:
        every: as given; a change takes effect at the next trace.
        nonfinite: position, from 1, of the first variable with a non-finite gradient, in an update
            that was skipped or measured; 0: none yet.
    """

    def __init__(self, every: bool | int) -> None:
        self.every = _interval(every)
        self.build(())  # the figures of nothing

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the state for the optimizer's variables."""
        self._variables = list(variables)
        count = len(self._variables)
        # Few variables, because each one costs time in a small model's step. For each variable the
        # means of its squared norm before the clip and of its clipped and total counts, as shares
        # of all that the clipper counts; in the last column that of the global norm.
        self.means = aggregation.zeros((3, count + 1), "telemetry_means")
        # Updates, and skipped ones.
        self.counts = aggregation.counter((2,), "telemetry_counts")
        self.nonfinite = aggregation.zeros((), "first_nonfinite", "int32")

    @property
    def state(self) -> list[keras.Variable]:
        """The variables that an update writes."""
        return [self.nonfinite, *([self.means, self.counts] if self.every else [])]

    def on_skip(self, gradients: Gradients) -> None:
        """Counts a skipped update."""
        self._note_nonfinite(gradients)
        if self.every:
            self.counts.assign(self.counts + ops.cast(_SKIPPED, self.counts.dtype))

    def on_update(self, update: ClippedUpdate) -> None:
        """Measures if this update is due, before weights change."""
        if not self.every:
            return
        if self.every == 1:
            self._measure(update)
        else:
            aggregation.cond(
                ops.equal(arithmetic.read(self.counts)[0] % self.every, 0),
                functools.partial(self._measure, update),
                state=self.state,
                reads=self._variables,
                merges=False,
            )
        self.counts.assign(self.counts + ops.cast(_UPDATE, self.counts.dtype))

    def _note_nonfinite(self, gradients: Gradients) -> None:
        """Searches gradients, unless one with an infinity or NaN was found before."""
        none = float(len(gradients) + 1)
        # A minimum of floats, because GPUs have no op for an argmax of integers.
        numbers = [
            ops.where(arithmetic.all_finite([g]), none, float(i))
            for i, g in enumerate(gradients, start=1)
            if g is not None
        ]
        first = ops.min(ops.stack(numbers))
        number = ops.cast(ops.where(first < none, first, 0.0), "int32")
        before = arithmetic.read(self.nonfinite)
        self.nonfinite.assign(ops.where(before > 0, before, number))

    def _measure(self, update: ClippedUpdate) -> None:
        zero = ops.zeros((), "float32")
        squares = ops.stack(
            [
                zero if g is None else arithmetic.sum_of_squares(arithmetic.values(g))
                for g in update.gradients
            ]
        )
        is_suspect = ops.logical_and(
            ops.equal(arithmetic.read(self.nonfinite), 0),
            ops.logical_not(ops.all(ops.isfinite(squares))),
        )
        search = functools.partial(self._note_nonfinite, update.gradients)
        aggregation.cond(is_suspect, search, state=[self.nonfinite], merges=False)
        stats = update.stats
        clipped = counted = ops.zeros_like(squares)
        if stats is not None and any(stats.weights):
            shares = np.asarray(stats.weights, "float64") / float(np.sum(stats.weights))
            counted = ops.convert_to_tensor(shares.astype("float32"))
            clipped = counted * ops.stack([zero if f is None else f for f in stats.fractions()])
        whole = ops.stack([ops.sqrt(ops.sum(squares)), zero, zero])
        now = ops.concatenate([ops.stack([squares, clipped, counted]), whole[:, None]], axis=1)
        measured = arithmetic.float32(arithmetic.read(self.counts)[0]) / self.every + 1.0
        before = arithmetic.read(self.means)
        self.means.assign(before + (now - before) / measured)

    def mean_norm(self) -> Scalar:
        """The global L2 norm before the clip, averaged; NaN before the first measurement."""
        is_measured = arithmetic.read(self.counts)[0] > 0
        return ops.where(is_measured, arithmetic.read(self.means)[0, -1], float("nan"))

    def mean_clip_fraction(self) -> Scalar:
        """Clipped / all, averaged; NaN before the first measurement, 0 without a clipper."""
        _, clipped, counted = ops.unstack(ops.sum(arithmetic.read(self.means), axis=1), num=3)
        nothing = ops.where(arithmetic.read(self.counts)[0] > 0, 0.0, float("nan"))
        return ops.where(counted > 0, clipped / ops.maximum(counted, arithmetic.TINY), nothing)

    def read(self) -> Config:
        """The figures since the last reset, fetched to the host.

        Means are over the measured updates.

        Returns:
            A dict: `layers` (list of layer paths), `layer_grad_norm` (array `[layers]`: the
            root mean square over the updates of the layer's L2 norm before the clip),
            `layer_clip_fraction` (array, 0..1), `grad_norm` (float, the mean global norm before
            the clip), `clip_fraction` (float), `updates` and `skipped` (ints). NaN where nothing
            was measured yet.

        Raises:
            ValueError: telemetry is off.
        """
        if not self.every:
            raise ValueError(
                "read_telemetry: nothing was recorded. Pass telemetry=True to ClippedOptimizer."
            )
        of_variables = layers_of(self._variables)
        layers = list(dict.fromkeys(of_variables))
        position = {layer: i for i, layer in enumerate(layers)}
        number = np.array([position[layer] for layer in of_variables], int)

        updates, skipped = map(int, aggregation.to_numpy(self.counts))
        means = aggregation.to_numpy(self.means).astype("float64")
        mean_squares, clipped, counted = (
            np.bincount(number, row[:-1], minlength=len(layers)) for row in means
        )
        nothing = 0.0 if updates else float("nan")
        out = np.full(len(layers), nothing)
        fractions = np.divide(clipped, counted, out=out, where=counted > 0)
        return {
            "layers": layers,
            "layer_grad_norm": (np.sqrt(mean_squares) + nothing).astype("float32"),
            "layer_clip_fraction": fractions.astype("float32"),
            "grad_norm": float(means[0, -1]) + nothing,
            "clip_fraction": clipped.sum() / counted.sum() if counted.any() else nothing,
            "updates": updates,
            "skipped": skipped,
        }

    def first_nonfinite(self) -> str | None:
        """The path of the first variable with a non-finite gradient; None: there was none."""
        number = int(aggregation.to_numpy(self.nonfinite))
        return path_of(self._variables[number - 1]) if number else None

    def set_interval(self, every: bool | int | None) -> None:
        """Sets `every` (None: off), and resets all figures."""
        self.every = _interval(every)
        self.reset()

    def reset(self) -> None:
        """Resets all figures."""
        for variable in (self.means, self.counts):
            variable.assign(np.zeros(variable.shape, str(variable.dtype)))


def _interval(every: bool | int | None) -> bool | int:
    if isinstance(every, bool):
        return every
    return validation.steps("ClippedOptimizer", "telemetry", every) or False
